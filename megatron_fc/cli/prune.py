"""`megatron-fc prune`: a smaller model of a trained checkpoint."""

import argparse

from megatron_fc.cli.parsing import Commands, add_remaking


def add(commands: Commands) -> None:
    prune = commands.add_parser(
        "prune",
        help="make a smaller model of a trained checkpoint: layers, heads, experts, FFN width",
        allow_abbrev=False,
        usage="megatron-fc prune CHECKPOINTS CONFIG.yaml [key=value ...] --export NAME=SIZE ... --to FOLDER\n"
        "       [--calibration-iters N]",
    )
    add_remaking(prune)
    prune.add_argument("--export", nargs="+", required=True, metavar="NAME=SIZE", help="e.g. num_experts=32")
    prune.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.compress.prune import prune
    from megatron_fc.runs.losses import print_losses
    from megatron_fc.runs.rank_log import is_log_rank

    done = prune(args.config, args.overrides, args.export, args.source, args.target, args.calibration_iters)
    if is_log_rank():
        print_losses({"original": done.original_loss, "pruned": done.loss})
        print(f"written to {args.target}, train it with: load={args.target} finetune=true {' '.join(done.settings)}")
    return 0
