"""The files that a run reads: data and tokenizer."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_fc.errors import UserError

_DATA_KEYS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def data_files(args: argparse.Namespace) -> dict[Path, str]:
    """Return the files that a run reads, data and tokenizer, each with the setting that names it."""
    files = {
        Path(prefix + suffix): f"{name}={prefix}"
        for name in _DATA_KEYS
        for prefix in _prefixes(getattr(args, name) or [])
        for suffix in (".bin", ".idx")
    }
    tokenizer = args.tokenizer_model
    # A name on a hub has one slash and is no path; anything else must be there.
    if tokenizer and (os.path.exists(tokenizer) or tokenizer.count("/") != 1 or tokenizer[0] in "./"):
        files[Path(tokenizer)] = f"tokenizer_model={tokenizer}"
    return files


def refuse_missing_files(args: argparse.Namespace) -> None:
    """Check that a run's data and tokenizer are here.

    Raises:
        UserError: a file is missing, or no data are named.
    """
    for file, setting in data_files(args).items():
        if not file.exists():
            raise UserError(f"{setting}: {file} does not exist; `megatron-fc data demo` makes the demo's data")
    if not args.mock_data and not any(getattr(args, name) for name in _DATA_KEYS):
        raise UserError("no data: set data_path, or train_data_path and valid_data_path")


def _prefixes(words: Iterable[str]) -> list[str]:
    """The data prefixes among Megatron's `weight prefix weight prefix` words."""

    def is_weight(word: str) -> bool:
        try:
            float(word)
        except ValueError:
            return False
        return True

    return [word for word in words if not is_weight(word)]
