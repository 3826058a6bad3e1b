"""`megatron-fc evaluate perplexity`: losses on validation sets."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_fc.cli.evaluate import add_source, asked_of
from megatron_fc.cli.parsing import Commands


def add(commands: Commands) -> None:
    perplexity = commands.add_parser(
        "evaluate perplexity",
        help="losses of checkpoints on validation sets, by document or by chunk, per token and per byte",
        allow_abbrev=False,
        usage="megatron-fc evaluate perplexity CHECKPOINTS CONFIG.yaml [key=value ...] --sets NAME=FILE ...\n"
        "       [--by document|chunk] [--data FOLDER] [--out FOLDER] [--every N] [--limit N] [--batch-size N]",
    )
    add_source(perplexity, "documents or chunks of each set")
    help = "Megatron's indexed files or lines of JSON with a text each; or a list such as configs/eval/olmoe.yaml"
    perplexity.add_argument("--sets", nargs="+", required=True, metavar="NAME=FILE", help=help)
    perplexity.add_argument("--data", type=Path, default=Path(), metavar="FOLDER", help="of the sets that a list names")
    perplexity.add_argument(
        "--by",
        choices=("document", "chunk"),
        default="document",
        help="what is scored by itself (default: %(default)s)",
    )
    perplexity.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sets = _sets(args.sets, args.data)

    def lines(results: dict[str, Any]) -> Iterator[str]:
        for name in sets:
            found = results["perplexity"][name]
            numbers = f"loss {found['value']:.4f}  perplexity {found['perplexity']:.2f}"
            yield f"{name}  {numbers}  {found['bits_per_byte']:.4f} bits per byte  {found['tokens']:,} tokens"

    asked = asked_of(args, lines)
    from megatron_fc.evaluate.perplexity import perplexity

    perplexity(asked, sets, args.by)
    return 0


def _sets(words: list[str], data: Path) -> dict[str, Path]:
    from megatron_fc.errors import UserError
    from megatron_fc.evaluate.task_list import read_task_list

    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if equals:
            new = {name: Path(path).expanduser()}
        elif word.endswith((".yaml", ".yml")):
            new = {name: data / name for name in read_task_list([word]).perplexity}
        else:
            raise UserError(f"--sets {word}: write NAME=FILE, or the path of a list")
        for name, file in new.items():
            if found.setdefault(name, file) != file:
                raise UserError(f"--sets: {name} is given twice, as {found[name]} and {file}: give one another name")
    return found
