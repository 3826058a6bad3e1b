"""`megatron-fc train`: a YAML config inside Megatron's training loop."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fc.cli.parsing import Commands

if TYPE_CHECKING:
    from megatron_fc.callbacks import Callback
    from megatron_fc.training.recipe import Recipe


def add(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a YAML config inside Megatron's training loop",
        allow_abbrev=False,
        usage="megatron-fc train CONFIG.yaml [key=value ...] [--dry-run] [--brief] [-- Megatron flags ...]",
    )
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. connection=residual optimizer.lr=1e-3")
    train.add_argument("--dry-run", action="store_true", help="check and print Megatron's command line, start nothing")

    train.add_argument("--brief", action="store_true", help="progress only: no notes before, no table after")
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.training.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides, args.megatron_flags)
    if args.dry_run:
        for note in recipe.notes:
            print(f"# {note}")
        print(_as_command(recipe.argv))
        return 0
    return train_recipe(recipe, brief=args.brief)


def train_recipe(recipe: "Recipe", brief: bool = False, callbacks: "Sequence[Callback]" = ()) -> int:
    """Train, and write the run's summary; `brief` leaves out the notes before and the table after."""
    from megatron_fc.runs.rank_log import is_log_rank
    from megatron_fc.runs.summary import comparison_table, write_summary
    from megatron_fc.training.loop import train

    if is_log_rank() and not brief:
        for line in recipe.told():
            print(line, flush=True)
    trained = train(recipe, callbacks)
    if is_log_rank():
        facts = {
            "connection": recipe.label,
            "family": recipe.family,
            "parameters": trained.parameters.total,
            "connection_parameters": trained.parameters.connections,
            "tokens": trained.tokens,
            "tokens_per_iteration": trained.tokens_per_iteration,
            "peak_memory_bytes": trained.peak_memory_bytes,
            "seconds": round(trained.seconds, 1),
            "world_size": trained.world_size,
            "backend": recipe.backend,
            "config": recipe.sections,
            "megatron_arguments": recipe.argv,
        }
        summary = write_summary(recipe.run_dir, facts)
        if not brief:
            from rich.console import Console

            Console().print(comparison_table([summary]))
            folders = [name for name in ("checkpoints", "tensorboard", "logs") if (recipe.run_dir / name).is_dir()]
            print(f"{recipe.run_dir}: {', '.join(['summary.json', *folders])}")
    return 0


def _as_command(argv: list[str]) -> str:
    """One flag per line, quoted for a shell."""
    import shlex

    lines = ["pretrain_gpt.py"]
    for word in argv:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)
