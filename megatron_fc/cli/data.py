"""`megatron-fc data`: training data."""

import argparse
from pathlib import Path

from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    data = commands.add_parser("data", help="make training data")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    demo_data = kinds.add_parser("demo", help="real text from this machine, tokenized, in Megatron's format")
    demo_data.add_argument("--out", type=Path, default=Path("data/demo"), help="folder (default: %(default)s)")
    demo_data.add_argument("--vocab-size", type=int, default=4096, help="tokens (default: %(default)s)")
    demo_data.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_fc.data import build_demo_data

    data = build_demo_data(args.out, vocab_size=args.vocab_size, report=print)
    print(f"train with: train_data_path={data.train_prefix} tokenizer_model={data.tokenizer}")
    return 0
