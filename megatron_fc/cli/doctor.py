"""`megatron-fc doctor`: what is installed and what it enables."""

import argparse

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="what is installed, what it enables, which backend will run")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.preflight import doctor

    return doctor.main(json=args.json)
