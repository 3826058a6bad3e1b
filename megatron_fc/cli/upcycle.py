"""`megatron-fc upcycle`: a plain checkpoint gets connections."""

import argparse
from pathlib import Path

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    upcycle = commands.add_parser(
        "upcycle",
        help="give a plain checkpoint connections, or take untrained ones away",
        allow_abbrev=False,
        usage="megatron-fc upcycle --from PLAIN --to FC CONFIG.yaml [key=value ...]\n"
        "       megatron-fc upcycle --to-residual --from FC --to PLAIN",
    )
    upcycle.add_argument("--from", type=Path, required=True, dest="source", metavar="FOLDER", help="of checkpoints")
    upcycle.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    upcycle.add_argument("--to-residual", action="store_true", help="the reverse, where nothing was trained yet")
    upcycle.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="the model, with connections")
    upcycle.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. connection=sfc rate=2")
    upcycle.set_defaults(run=run, parser=upcycle)


def run(args: argparse.Namespace) -> int:
    if (args.config is None) != args.to_residual:
        args.parser.error("upcycle needs CONFIG.yaml, and with --to-residual takes none")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.convert.upcycle import residual_checkpoint, upcycle_checkpoint
    from megatron_fc.runs.rank_log import is_log_rank
    from megatron_fc.training.recipe import load_recipe

    if args.to_residual:
        said = residual_checkpoint(args.source, args.target)
    else:
        said = upcycle_checkpoint(load_recipe(args.config, args.overrides), args.source, args.target)
    if is_log_rank():
        print(said)
    return 0
