"""`megatron-fc evaluate fetch`: data of tasks, for machines without internet."""

import argparse
from pathlib import Path

from megatron_fc.cli.evaluate import add_tasks, quieten_harness
from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    fetch = commands.add_parser(
        "evaluate fetch",
        help="put the data of tasks into a folder, for `evaluate --data` where there is no internet",
        allow_abbrev=False,
        usage="megatron-fc evaluate fetch --tasks TASK ... --to FOLDER [--include FOLDER ...]",
    )
    add_tasks(fetch)
    fetch.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER")
    fetch.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    quieten_harness()
    from megatron_fc.evaluate.task_list import read_task_list
    from megatron_fc.evaluate.tasks import fetch

    fetch(read_task_list(args.tasks, args.include), args.target, print)
    print(f"written to {args.target}, evaluate with: --data {args.target}")
    return 0
