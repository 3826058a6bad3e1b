"""Validation sets as rows to score: Megatron's indexed files, or texts as lines of JSON."""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.evaluate.scoring import Row
from megatron_fc.training.indexed_files import IndexedFiles

_TEXTS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class TextSet:
    """Rows of a validation set.

    Attributes:
        rows: to score; every scored token counts once.
        size: bytes of the text that is scored, in UTF-8.
    """

    rows: list[Row]
    size: int

    @property
    def tokens(self) -> int:
        return sum(row.scored for row in self.rows)


def find_set(path: Path) -> Path:
    """Return the file that a path stands for: an index of Megatron's, or lines of JSON with a `text` each.

    Args:
        path: of the file, or without its ending.

    Raises:
        UserError: there is none, or an index without its tokens, or the first line has no text.
    """
    for found in (path, *(path.with_name(path.name + ending) for ending in (".idx", *_TEXTS))):
        if found.is_file() and found.name.endswith((".idx", *_TEXTS)):
            if found.suffix == ".idx":
                _indexed(found)
            else:
                next(_texts(found), None)
            return found
    raise UserError(f"no validation set {path}: give a file {path}.idx with its .bin, {path}.jsonl or {path}.jsonl.gz")


def digest_of(file: Path) -> str:
    """Of the bytes of what `find_set` returns, those of the tokens among them; a copy has the same."""
    files = (file, file.with_suffix(".bin")) if file.suffix == ".idx" else (file,)
    digests = []
    for path in files:
        try:
            with path.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest()[:32])
        except OSError as error:
            raise UserError(f"{path} cannot be read, {error.strerror}: repair that, or give another set") from error
    return "-".join(digests)


def documents(file: Path, tokenizer: Any, vocabulary: int) -> Iterator[tuple[list[int], int]]:
    """Yield the tokens of every document, without the token that ends it, and the bytes of its text.

    Args:
        file: of `find_set`.
        tokenizer: Megatron's.
        vocabulary: entries of the model's.

    Raises:
        UserError: the file is damaged, a line is no JSON with a text, or a token is not of the vocabulary.
    """
    if file.suffix == ".idx":
        for tokens in _indexed_documents(file, tokenizer.eod, vocabulary):
            yield tokens, _bytes(tokenizer, tokens)
        return
    for text in _texts(file):
        yield [int(token) for token in tokenizer.tokenize(text)], len(text.encode())


def _texts(file: Path) -> Iterator[str]:
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(f'line {number} of {file} is no JSON object with a "text": correct it')
                yield text
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{file} is damaged behind line {number}, {error}: get it anew, in UTF-8") from error


def by_document(
    file: Path, tokenizer: Any, vocabulary: int, windows: Callable[[Sequence[int]], Sequence[Row]], limit: int | None
) -> TextSet:
    """Every document by itself, in windows; its first token is predicted, too.

    Args:
        windows: of a document's tokens.
        limit: documents, None for all.
    """
    rows: list[Row] = []
    size = 0
    for number, (tokens, of_text) in enumerate(documents(file, tokenizer, vocabulary)):
        if number == limit:
            break
        rows += windows(tokens)
        size += of_text
    return TextSet(rows, size)


def by_chunk(file: Path, tokenizer: Any, vocabulary: int, length: int, limit: int | None) -> TextSet:
    """All documents in a row, each with the token that ends it, cut into chunks of the model's length.

    The first token of a chunk is not predicted, and what is left at the end is dropped, as OLMo does in training. A
    character that is cut by a border counts as the bytes of its replacement.

    Args:
        length: of a chunk.
        limit: chunks, None for all.
    """
    rows: list[Row] = []
    size = 0
    left: list[int] = []
    for tokens, _ in documents(file, tokenizer, vocabulary):
        left += [*tokens, tokenizer.eod]
        while len(left) >= length and len(rows) != limit:
            rows.append(Row(tuple(left[:length]), length - 1))
            size += _bytes(tokenizer, left[1:length])
            left = left[length:]
        if len(rows) == limit:
            break
    return TextSet(rows, size)


def _indexed_documents(file: Path, eod: int, vocabulary: int) -> Iterator[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    _indexed(file).refuse_damage(vocabulary)
    stored = IndexedDataset(str(file.with_suffix("")))
    for first, last in itertools.pairwise(stored.document_indices):
        tokens = [int(token) for number in range(first, last) for token in stored[number]]
        if tokens and max(tokens) >= vocabulary:  # a large file is looked at in places
            raise UserError(
                f"{file} has a token {max(tokens)}, and the model a vocabulary of {vocabulary}: another set?"
            )
        yield tokens[:-1] if tokens and tokens[-1] == eod else tokens


def _indexed(file: Path) -> IndexedFiles:
    return IndexedFiles.read(str(file.with_suffix("")), f"the validation set {file}")


def _bytes(tokenizer: Any, tokens: list[int]) -> int:
    """Of a text, without the special tokens around it."""
    return len(tokenizer.detokenize(tokens, skip_special_tokens=True).encode()) if tokens else 0
