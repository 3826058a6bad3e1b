"""`megatron-fc preflight`: what a run needs of its nodes."""

import argparse
import os
import sys
from pathlib import Path

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import NodeError, UserError


def add(commands: Commands) -> None:
    preflight = commands.add_parser(
        "preflight",
        help="check nodes, network, clocks, files and room for a run, on all its ranks",
        allow_abbrev=False,
    )
    preflight.add_argument("config", type=Path, metavar="CONFIG.yaml")
    preflight.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    preflight.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.preflight.nodes import Requirements, preflight

    def read_requirements() -> Requirements:
        from megatron_fc.training import cpu_lane

        cpu_lane.install()
        from megatron_fc.preflight.requirements import requirements_of
        from megatron_fc.training.recipe import load_recipe

        return requirements_of(load_recipe(args.config, args.overrides))

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        found = preflight(read_requirements)
    except NodeError as error:
        if speaks or not error.seen_by_all:
            print(f"megatron-fc: preflight: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except UserError:
        if speaks:
            raise
        return 2
    if speaks:
        print(f"preflight: {found}")
    return 0
