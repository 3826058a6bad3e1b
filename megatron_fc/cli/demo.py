"""`megatron-fc demo`: a residual and a Frac-Connections model, trained and compared."""

import argparse
from pathlib import Path

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="train a residual and a Frac-Connections MoE and compare them")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    demo.add_argument("--data", type=Path, default=Path("data/demo"), help="data folder (default: %(default)s)")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="for both runs, e.g. train_iters=400")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.demo.run import run_demo

    return run_demo(args.out, args.data, args.overrides)
