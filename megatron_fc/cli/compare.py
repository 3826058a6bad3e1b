"""`megatron-fc compare`: finished runs side by side."""

import argparse
from pathlib import Path

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import UserError


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="table and curves of finished runs, the first is the baseline")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    compare.add_argument("--plot", type=Path, help="write the training curves to this PNG")
    compare.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_fc.runs.plot import plot_losses, told_apart
    from megatron_fc.runs.summary import comparison_table, read_summary

    summaries = []
    for run_dir in args.runs:
        summary = read_summary(run_dir)
        if summary is None:
            raise UserError(
                f"{run_dir} has no summary.json: give the folder of a run that has finished; `megatron-fc analyze "
                f"losses` compares runs under way"
            )
        summaries.append(summary)
    Console().print(comparison_table(summaries))
    if args.plot is not None:
        labels = told_apart([summary["connection"] for summary in summaries], args.runs)
        print(f"curves: {plot_losses(list(zip(labels, args.runs, strict=True)), args.plot)}")
    return 0
