"""`megatron-fc runs`: where runs stand."""

import argparse
from pathlib import Path

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    runs = commands.add_parser("runs", help="where runs stand: progress, restarts and why, checkpoints, losses")
    runs.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER", help="default: runs")
    runs.add_argument("--json", action="store_true", help="machine-readable")
    runs.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.runs import status_table

    return status_table.main(args.folders, args.json)
