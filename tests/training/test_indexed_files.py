"""Data as they really are: cut, empty, of another file, of another vocabulary. Each is found before a rank starts."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fc.errors import UserError
from megatron_fc.training import indexed_files
from megatron_fc.training.indexed_files import IndexedFiles
from support.token_files import write_tokens

SEQUENCES, VOCABULARY = 40, 300
HEAD = 34


def cut(file: Path, to: int) -> None:
    os.truncate(file, to)


def put(file: Path, at: int, kind: str, value: int) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into(kind, content, at, value)
    file.write_bytes(content)


def swap_index(prefix: Path) -> None:
    write_tokens(prefix.with_name("other"), sequences=3, seed=1)
    shutil.copy(prefix.with_name("other.idx"), prefix.with_suffix(".idx"))


LENGTHS, POINTERS, ENDS = HEAD, HEAD + 4 * SEQUENCES, HEAD + 12 * SEQUENCES
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "index cut": (lambda p: cut(p.with_suffix(".idx"), 200), r"has 200 bytes, and 842 by its header"),
    "index cut in its header": (lambda p: cut(p.with_suffix(".idx"), 20), "is no index of Megatron's"),
    "index empty": (lambda p: cut(p.with_suffix(".idx"), 0), "is no index of Megatron's"),
    "index of text": (lambda p: p.with_suffix(".idx").write_text("x" * 500) and None, "is no index of Megatron's"),
    "type of numbers": (lambda p: put(p.with_suffix(".idx"), 17, "<B", 7), "version 1 and type 7, no index of tokens"),
    "unknown type": (lambda p: put(p.with_suffix(".idx"), 17, "<B", 99), "version 1 and type 99, no index of tokens"),
    "tokens cut": (lambda p: cut(p.with_suffix(".bin"), 100), r"\.bin has 100 bytes, and [0-9,]+ by data.idx"),
    "tokens empty": (lambda p: cut(p.with_suffix(".bin"), 0), "hold no token"),
    "half a token": (lambda p: cut(p.with_suffix(".bin"), 101), r"\.bin has 101 bytes, and"),
    "index of other data": (swap_index, r"\.bin has [0-9,]+ bytes, and [0-9,]+ by data.idx"),
    "last document": (lambda p: put(p.with_suffix(".idx"), ENDS + 8 * SEQUENCES, "<q", 3), "do not end where its 40"),
    "a document": (lambda p: put(p.with_suffix(".idx"), ENDS + 40, "<q", 10**9), "do not follow each other"),
    "a place": (
        lambda p: put(p.with_suffix(".idx"), POINTERS + 56, "<q", 10**12),
        "sequence 7 of .* begins at a place",
    ),
    "a length": (lambda p: put(p.with_suffix(".idx"), LENGTHS + 28, "<i", -5), "sequence 7 of .* begins at a"),
    "no file": (lambda p: p.with_suffix(".bin").unlink(), r"data.bin does not exist"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_sentence(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_files, "_CHUNK", 4)  # whose bounds are in the middle
    prefix = write_tokens(tmp_path / "data")
    IndexedFiles.read(str(prefix), "data_path=x").refuse_damage(VOCABULARY)
    damage, sentence = DAMAGE[kind]
    damage(prefix)
    with pytest.raises(UserError, match=f"^data_path=x: .*{sentence}"):
        IndexedFiles.read(str(prefix), "data_path=x").refuse_damage(VOCABULARY)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(5000, "uint16"), (70_000, "int32")])
def test_tokens_of_another_vocabulary(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    files = IndexedFiles.read(str(write_tokens(tmp_path / "data", vocabulary)), "data_path=x")
    assert files.dtype == dtype
    files.refuse_damage(vocabulary)
    with pytest.raises(UserError, match=r"token [0-9,]+ of \S+ is [0-9,]+, and the model's vocabulary has 4,000: give"):
        files.refuse_damage(4000)


def test_tokens_of_large_data_are_looked_at_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_files, "_WINDOW", 64)
    monkeypatch.setattr(indexed_files, "_SCANNED", 256)
    files = IndexedFiles.read(str(write_tokens(tmp_path / "data")), "data_path=x")
    windows = list(files._windows())
    assert [len(ids) for _, ids in windows] == [32] * 4
    assert windows[0][0] == 0
    assert windows[-1][0] + 32 == files.tokens
    put(tmp_path / "data.bin", 2 * windows[2][0] + 10, "<H", 400)
    with pytest.raises(
        UserError, match=f"token {windows[2][0] + 5:,} of .* is 400, and the model's vocabulary has 300"
    ):
        files.refuse_damage(300)


def test_negative_tokens(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "data", 70_000)
    put(tmp_path / "data.bin", 12, "<i", -2)
    with pytest.raises(UserError, match=r"token 3 of \S+ is -2, and"):
        IndexedFiles.read(str(prefix), "data_path=x").refuse_damage(70_000)
