"""`megatron-fc quantize`: a trained checkpoint, quantised."""

import argparse

from megatron_fc.cli.parsing import Commands, add_remaking


def add(commands: Commands) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="quantise a trained checkpoint with ModelOpt, calibrated on the run's validation data",
        allow_abbrev=False,
        usage="megatron-fc quantize CHECKPOINTS CONFIG.yaml [key=value ...] --recipe RECIPE --to FOLDER\n"
        "       [--calibration-iters N]",
    )
    add_remaking(quantize)
    quantize.add_argument("--recipe", required=True, choices=("fp8", "int8", "int4_awq", "nvfp4"))
    quantize.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.compress.quantize import quantize
    from megatron_fc.runs.losses import print_losses
    from megatron_fc.runs.rank_log import is_log_rank
    from megatron_fc.training.recipe import load_recipe

    recipe = load_recipe(args.config, args.overrides)
    done = quantize(recipe, args.source, args.target, args.recipe, args.calibration_iters)
    if is_log_rank():
        print_losses({"original": done.original_loss, args.recipe: done.loss})
        print(f"{done.quantizers} quantizers: written to {args.target}")
    return 0
