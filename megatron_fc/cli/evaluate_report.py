"""`megatron-fc evaluate report`: results of runs as a table and as curves over tokens."""

import argparse
from pathlib import Path

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    report = commands.add_parser(
        "evaluate report",
        help="a table of runs beside the paper's numbers, and curves over tokens; the first run is the baseline",
        allow_abbrev=False,
        usage="megatron-fc evaluate report RESULTS ... --to FOLDER [--tasks LIST.yaml ...] [--decay D]",
    )
    report.add_argument("folders", nargs="+", type=Path, metavar="RESULTS", help="--out of an evaluation, a run each")
    report.add_argument(
        "--to", type=Path, required=True, dest="target", metavar="FOLDER", help="of results.md and PNGs"
    )
    help = "with averages and the paper's numbers, such as configs/eval/olmoe.yaml"
    report.add_argument("--tasks", nargs="+", default=[], metavar="LIST.yaml", help=help)
    help = "of the moving average over checkpoints, corrected for its start; 0 for none (default: 0.5, below ten 0)"
    report.add_argument("--decay", type=float, metavar="D", help=help)
    report.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.evaluate.report import write_report
    from megatron_fc.evaluate.task_list import read_task_list

    for file in write_report(args.folders, read_task_list(args.tasks), args.target, args.decay):
        print(file)
    return 0
