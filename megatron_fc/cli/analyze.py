"""`megatron-fc analyze`: what connections have learnt, and how training curves compare."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fc.cli.parsing import Commands
from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from megatron_fc.analysis.source import Source

_OF_CHECKPOINTS = {
    "coefficients": "alpha, beta and gamma of every site over data, and the gain of the residual path",
    "similarity": "cosine between the inputs of consecutive sub-layers",
    "gradients": "gradient norm of every layer",
}


def add(commands: Commands) -> None:
    analyze = commands.add_parser("analyze", help="what connections have learnt, and how training curves compare")
    analyze.set_defaults(run=run)
    actions = analyze.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help in _OF_CHECKPOINTS.items():
        action = actions.add_parser(
            name,
            help=help,
            allow_abbrev=False,
            usage=f"megatron-fc analyze {name} RUN [key=value ...] [--config CONFIG.yaml] [--samples N]\n"
            f"       [--out FOLDER] [--against FOLDER ...]",
        )
        action.add_argument("source", type=Path, metavar="RUN", help="folder of a run, of checkpoints, or one of them")
        action.add_argument("overrides", nargs="*", metavar="key=value", help="as for train; the layout is free")
        help = "of the run (default: what the summary of a finished run says)"
        action.add_argument("--config", type=Path, metavar="CONFIG.yaml", help=help)
        help = "validation sequences that the model is run on (default: %(default)s)"
        action.add_argument("--samples", type=int, default=16, metavar="N", help=help)
        _add_out(action)
        help = "--out of the same analysis of other checkpoints, to stand beside"
        action.add_argument("--against", type=Path, nargs="+", default=[], metavar="FOLDER", help=help)
    losses = actions.add_parser(
        "losses",
        help="training curves against a baseline's, spikes, and how much earlier they get where it ends",
        allow_abbrev=False,
        usage="megatron-fc analyze losses RUN ... --baseline RUN ... [--decay D] [--out FOLDER]",
    )
    losses.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, which may still train")
    help = "one for all, or one for each seed"
    losses.add_argument("--baseline", type=Path, nargs="+", required=True, metavar="RUN", help=help)
    help = "of the moving average, corrected for its start (default: %(default)s)"
    losses.add_argument("--decay", type=float, default=0.9, metavar="D", help=help)
    _add_out(losses)


def _add_out(action: argparse.ArgumentParser) -> None:
    default = Path("runs/analysis")
    help = "of JSON, PNGs and analysis.html, of all analyses in it (default: %(default)s)"
    action.add_argument("--out", type=Path, default=default, metavar="FOLDER", help=help)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron_fc.analysis.losses import analyze_losses, in_words
    from megatron_fc.analysis.page import difference_in_words, earlier_in_words, write_analysis

    if args.action != "losses":
        return _of_checkpoint(args)
    found = analyze_losses(args.runs, args.baseline, args.decay)
    for of in found["runs"]:
        line = f"{of['name']}  seed {of['seed']}  smoothed loss {of['loss']:.4f}"
        if of["baseline"] is not None:
            line += f"  {in_words(of)}  times earlier: {earlier_in_words(of['earlier'])}"
        gain = f"  residual gain {of['residual_gain'][-1][1]:.2f}" if of["residual_gain"] else ""
        print(f"{line}  spikes {len(of['loss_spikes'])}, of gradients {len(of['gradient_spikes'])}{gain}")
    for group in found["groups"]:
        if len(group["seeds"]) > 1:
            words = difference_in_words(group["difference"])
            print(f"{group['name']}  mean of {len(group['seeds'])} seeds  {words} (95 %)")
    print("\n".join(map(str, write_analysis(args.out, "losses", found))))
    return 0


def _of_checkpoint(args: argparse.Namespace) -> int:
    from megatron_fc.analysis.coefficients import analyze_coefficients
    from megatron_fc.analysis.gradients import analyze_gradients
    from megatron_fc.analysis.page import other_tokens, read_analyses, refuse_other_checkpoint, write_analysis
    from megatron_fc.analysis.similarity import analyze_similarity
    from megatron_fc.analysis.source import find_source
    from megatron_fc.runs.writable import refuse_unwritable

    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: give a number from 1 on")
    analyses: dict[str, Callable[[Source], dict[str, Any] | None]] = {
        "coefficients": analyze_coefficients,
        "similarity": analyze_similarity,
        "gradients": analyze_gradients,
    }
    others = read_analyses(args.against, args.action)
    refuse_unwritable(args.out)
    source = find_source(args.source, args.config, args.overrides, args.samples)
    refuse_other_checkpoint(args.out, args.action, source.checkpoint)
    found = analyses[args.action](source)
    if found is not None:  # this is the first rank
        written = write_analysis(args.out, args.action, found, others)
        print("\n".join([*other_tokens(found, others), *map(str, written)]))
    return 0
