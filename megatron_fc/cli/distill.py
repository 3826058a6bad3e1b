"""`megatron-fc distill`: a student that learns from a teacher."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fc.cli.parsing import Commands
from megatron_fc.cli.train import train_recipe

if TYPE_CHECKING:
    from megatron_fc.compress.distill import Distillation


def add(commands: Commands) -> None:
    distill = commands.add_parser(
        "distill",
        help="train a student on a teacher's distribution over the next token, with ModelOpt",
        allow_abbrev=False,
        usage="megatron-fc distill CONFIG.yaml [key=value ...] --teacher CHECKPOINTS [--teacher-config TEACHER.yaml]\n"
        "       [--temperature T] [--lm-loss-weight W]",
    )
    distill.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the student's run")
    distill.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    add_teacher(distill, required=True)
    distill.set_defaults(run=run)


def add_teacher(parser: argparse._ActionsContainer, required: bool = False) -> None:
    """Add the arguments of a distillation."""
    parser.add_argument("--teacher", type=Path, required=required, metavar="CHECKPOINTS", help="with or without FC")
    parser.add_argument("--teacher-config", type=Path, metavar="TEACHER.yaml", help="where it is no CONFIG.yaml model")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    parser.add_argument(
        "--lm-loss-weight", type=float, default=0.0, metavar="W", help="of the next-token loss (default: %(default)s)"
    )


def distillation(args: argparse.Namespace) -> "Distillation":
    """The callback that `add_teacher`'s arguments ask for."""
    from megatron_fc.compress.distill import Distillation, teacher_recipe

    teacher = teacher_recipe(args.config, args.overrides, args.teacher_config, args.teacher)
    return Distillation(teacher, args.teacher, args.temperature, args.lm_loss_weight)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.training.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides)
    return train_recipe(recipe, callbacks=[distillation(args)])
