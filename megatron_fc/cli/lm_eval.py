"""`megatron-fc lm-eval`: the lm-evaluation-harness's own command line, which knows our checkpoints then."""

import argparse

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    lm_eval = commands.add_parser(
        "lm-eval",
        help="the lm-evaluation-harness's own command line, with --model megatron_fc",
        add_help=False,  # the harness has its own, as all options here are
        prefix_chars="\0",
        usage="megatron-fc lm-eval run --model megatron_fc --model_args checkpoint=FOLDER config=FILE [key=value ...]\n"
        "       [the harness's options ...]",
    )
    lm_eval.add_argument("words", nargs="*", metavar="ARGUMENTS", help="the harness's")
    lm_eval.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import sys

    from megatron_fc.evaluate.command_line import run_command_line

    program, sys.argv = sys.argv, ["lm-eval", *args.words]
    try:
        run_command_line()
    finally:
        sys.argv = program
    return 0
