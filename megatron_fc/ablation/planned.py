"""A suite's run as `megatron-fc train` takes it, and what tells its settings and data from those of others."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fc.ablation.suite import Run, Suite
from megatron_fc.errors import UserError
from megatron_fc.training.data_files import blends, indexed_files
from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.recipe import load_recipe

# Sections that change no result, and settings that another machine has at another place.
_WITHOUT_RESULT = ("logging", "checkpoint")
_PLACES = ("_path", "tokenizer_model")
_SAMPLE = 1 << 20  # bytes of either end of a file that stand for it


@dataclass(frozen=True)
class Planned:
    """A run, checked.

    Attributes:
        run: it.
        words: `key=value`, those of its folder and of the validation included.
        run_dir: its folder.
        digest: of what decides its result, but for the data.
        data: of the tokens that it reads.
    """

    run: Run
    words: list[str]
    run_dir: Path
    digest: str
    data: str


def plan(suite: Suite, runs: Iterable[Run], out: Path) -> list[Planned]:
    """Return runs as they are started; nothing is written.

    Where no setting names `eval_iters` the whole validation set is run, but for the rest that fills no batch.

    Args:
        suite: theirs.
        runs: of the suite.
        out: folder of their folders.

    Raises:
        UserError: as `load_recipe`, with the variant's name and before any run has begun; or the size of the validation
            set is not known.
    """
    planned, known = [], {}
    for run in runs:
        words = [*suite.settings_of(run), f"run_dir={out / run.name}"]
        try:
            recipe = load_recipe(suite.config, words)
            args = megatron_arguments().parse(recipe.argv)
        except UserError as error:
            raise UserError(f"{run.variant} of {suite.file}: {error}") from None
        if not any(word.partition("=")[0].rpartition(".")[2] == "eval_iters" for word in words):
            words.append(f"eval_iters={_whole_validation(args, suite)}")
            recipe = load_recipe(suite.config, words)
        files = indexed_files(args)
        prefixes = tuple(file.prefix for file in files)
        if prefixes not in known:
            known[prefixes] = _digest([[file.tokens, file.sequences, _ends(file.prefix)] for file in files])
        planned.append(Planned(run, words, recipe.run_dir, digest_of(recipe.sections), known[prefixes]))
    return planned


def _whole_validation(args: Namespace, suite: Suite) -> int:
    prefixes = [prefix for blend in blends(args) if blend.setting == "valid_data_path" for prefix in blend.prefixes]
    if not prefixes:
        raise UserError(f"{suite.config} has no valid_data_path, whose size would set eval_iters: set one of the two")
    tokens = sum(file.tokens for file in indexed_files(args) if file.prefix in prefixes)
    batch = args.eval_global_batch_size or args.global_batch_size or args.micro_batch_size
    # A sample has one token more than its length; the next one begins with that.
    return max(1, int((tokens - 1) // args.seq_length // batch))


def digest_of(sections: dict[str, dict[str, Any]]) -> str:
    """Return what is the same for configs that compute the same, wherever their data lie."""
    return _digest(
        {
            name: {key: value for key, value in values.items() if not key.endswith(_PLACES)}
            for name, values in sections.items()
            if name not in _WITHOUT_RESULT
        }
    )


def _ends(prefix: str) -> str:
    with open(f"{prefix}.bin", "rb") as file:
        first = file.read(_SAMPLE)
        file.seek(max(0, file.seek(0, 2) - _SAMPLE))
        return hashlib.sha256(first + file.read()).hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
