"""`megatron-fc evaluate perplexity`: losses of checkpoints on validation sets, per token and per byte."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.evaluate.chosen import Evaluation, evaluate_each
from megatron_fc.evaluate.engine import Engine
from megatron_fc.evaluate.questions import Questions
from megatron_fc.evaluate.results import lacking
from megatron_fc.evaluate.texts import TextSet, by_chunk, by_document, digest_of, find_set
from megatron_fc.evaluate.windows import windows


def perplexity(asked: Evaluation, sets: Mapping[str, Path], by: str) -> None:
    """Evaluate checkpoints on validation sets and add to `iter_*.json`; every rank calls it.

    Args:
        asked: the checkpoints.
        sets: by name, a file as in `texts.find_set`.
        by: document or chunk.

    Raises:
        UserError: a set is missing or of another tokenizer, or the checkpoints cannot be evaluated by this config.
    """
    limit = asked.limit
    settings: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    read: dict[str, TextSet] = {}

    def prepare() -> None:
        for name, path in sets.items():
            files[name] = find_set(path)
            settings[name] = {"by": by, "limit": limit, "digest": digest_of(files[name])}

    def missing(results: dict[str, Any]) -> list[str]:
        return lacking(results, "perplexity", settings)

    def ask(questions: Questions, names: Sequence[str]) -> dict[str, Any]:
        found = {}
        for name in names:
            if name not in read:
                read[name] = _read(questions.engine, sets[name], by, limit)
            found[name] = _loss(questions, read[name], name) | settings[name] | {"file": str(files[name].resolve())}
        return found

    evaluate_each(asked, "perplexity", prepare, missing, ask)


def _read(engine: Engine, path: Path, by: str, limit: int | None) -> TextSet:
    common = (find_set(path), engine.tokenizer, engine.args.padded_vocab_size)
    if by == "chunk":
        found = by_chunk(*common, engine.max_length, limit)
    else:
        found = by_document(*common, partial(windows, first=engine.first_token, length=engine.max_length), limit)
    if not found.tokens:
        chunk = f", not one chunk of seq_length={engine.max_length}: give --by document" if by == "chunk" else ""
        raise UserError(f"{common[0]} has no token to score{chunk or ': give another set'}")
    return found


def _loss(questions: Questions, texts: TextSet, name: str) -> dict[str, Any]:
    nats = -math.fsum(score.logprob for score in questions.scores(texts.rows, name))
    loss = nats / texts.tokens
    return {
        "value": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": nats / math.log(2) / texts.size if texts.size else math.nan,
        "tokens": texts.tokens,
        "bytes": texts.size,
    }
