"""`megatron-fc prune`: a smaller model of a trained checkpoint."""

import argparse
from pathlib import Path

from megatron_fc.commands.parsing import Commands


def add(commands: Commands) -> None:
    prune = commands.add_parser(
        "prune",
        help="make a smaller model of a trained checkpoint: layers, heads, experts, FFN width",
        allow_abbrev=False,
        usage="megatron-fc prune CHECKPOINTS CONFIG.yaml [key=value ...] --export NAME=SIZE ... --to FOLDER\n"
        "       [--calibration-iters N]",
    )
    prune.add_argument("source", type=Path, metavar="CHECKPOINTS", help="folder of checkpoints, or one of them")
    prune.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of the run that wrote them")
    prune.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    prune.add_argument("--export", nargs="+", required=True, metavar="NAME=SIZE", help="e.g. num_experts=32")
    prune.add_argument("--to", type=Path, required=True, dest="target", metavar="FOLDER", help="new, for `load`")
    prune.add_argument(
        "--calibration-iters", type=int, default=16, metavar="N", help="validation iterations (default: %(default)s)"
    )
    prune.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.megatron import cpu

    cpu.install()
    from megatron_fc.megatron.compress.prune import prune
    from megatron_fc.report.losses import print_losses
    from megatron_fc.report.runlog import is_log_rank

    done = prune(args.config, args.overrides, args.export, args.source, args.target, args.calibration_iters)
    if is_log_rank():
        print_losses({"original": done.original_loss, "pruned": done.loss})
        print(f"written to {args.target}, train it with: load={args.target} finetune=true {' '.join(done.settings)}")
    return 0
