"""Validation sets: what of them is scored and counted, and what is refused by name."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_fc import UserError
from megatron_fc.data.indexed import write_indexed
from megatron_fc.evaluate.scoring import Row
from megatron_fc.evaluate.texts import by_chunk, by_document, find_set

BOS, EOD = 256, 257
TEXTS = ["häuser", "und wege", "z"]


class Bytes:
    """A tokenizer of bytes that puts a token before each text."""

    bos, eod = BOS, EOD

    def tokenize(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def detokenize(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        kept = [token for token in tokens if token < BOS or not skip_special_tokens]
        return (
            "".join("<s>" if token == BOS else "</s>" if token == EOD else chr(token) for token in kept)
            .encode("latin-1")
            .decode(errors="replace")
        )


def whole(tokens: Sequence[int]) -> list[Row]:
    return [Row(tuple(tokens), len(tokens) - 1)]


def lines(path: Path, *texts: object) -> Path:
    path.write_text("".join(f"{json.dumps({'text': text})}\n\n" for text in texts))
    return path


def test_special_tokens_are_no_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "set.jsonl", *TEXTS)
    size = len("".join(TEXTS).encode())
    assert by_document(path, Bytes(), 258, whole, None).size == size
    write_indexed(tmp_path / "indexed", [Bytes().tokenize(text) for text in TEXTS], 258, eod=EOD)
    assert by_document(find_set(tmp_path / "indexed"), Bytes(), 258, whole, None).size == size
    for file in (path, tmp_path / "indexed.idx"):
        found = by_chunk(file, Bytes(), 258, size + 2 * len(TEXTS), None)
        assert (found.size, found.tokens) == (size, size + 2 * len(TEXTS) - 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("set.jsonl", b'{"text": "a"}\n{"text": null}\n', 'line 2 of .* is no JSON object with a "text"'),
        ("set.jsonl", b"5\n", 'line 1 of .* is no JSON object with a "text"'),
        ("set.jsonl", b'{"text": "\xff"}\n', "is damaged behind line 0, .*utf-8"),
        ("set.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "is damaged behind line"),
        ("set.jsonl.gz", b"no gzip", "is damaged behind line 0"),
        ("set.idx", b"no index", "set.bin does not exist"),
    ],
)
def test_refusals(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        by_document(find_set(tmp_path / "set"), Bytes(), 258, whole, None)


def test_a_set_without_texts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match=r'line 1 of .* is no JSON object with a "text"'):
        find_set(tmp_path / "set")


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(b"\1\0")
    (tmp_path / "set.idx").write_bytes(b"no index")
    with pytest.raises(UserError, match="is no index of Megatron's"):
        find_set(tmp_path / "set")
