"""Megatron's indexed format, `<prefix>.bin` (token ids) and `<prefix>.idx` (index), written in flat memory.

Megatron's own builder keeps two Python lists with an entry per document; here it is four bytes. The files are the same,
byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# As in megatron.core.datasets.indexed_dataset, whose import takes longer than many a task; a test compares.
_HEADER, _CODES = b"MMIDIDX\x00\x00", {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
_CHUNK = 1 << 20  # entries of the index that are written together


class IndexedWriter:
    """Writes documents one after the other, each as one sequence.

    Args:
        prefix: path without `.bin` and `.idx`.
        dtype: of a token.

    Attributes:
        lengths: tokens of each document so far.
        tokens: their sum.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._bin = HashedFile(Path(f"{prefix}.bin"))
        self.lengths, self.tokens = array("i"), 0

    def add(self, ids: np.ndarray[Any, Any]) -> None:
        """Append a document's tokens, which fit the type."""
        self._bin.write(ids.astype(self._dtype, copy=False).tobytes())
        self.lengths.append(ids.size)
        self.tokens += ids.size

    def close(self) -> None:
        """End `.bin` without an index, as an error leaves it."""
        self._bin.close()

    def finish(self) -> dict[str, str]:
        """Write the index; both files are on the disk then. Returns the SHA-256 of `bin` and `idx`."""
        self._bin.close()
        lengths = np.frombuffer(self.lengths, np.int32) if self.lengths else np.empty(0, np.int32)
        return {"bin": self._bin.sha256, "idx": write_index(Path(f"{self._prefix}.idx"), self._dtype, [lengths])}


class HashedFile:
    """A new file that knows the SHA-256 of what was written, and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = path.open("wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> None:
        if not self._file.closed:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def token_type(vocabulary: int) -> np.dtype[Any]:
    """Return the type that Megatron stores tokens of a vocabulary of this size in."""
    return np.dtype(np.uint16 if vocabulary < 65500 else np.int32)


def write_index(path: Path, dtype: np.dtype[Any], lengths: Sequence[np.ndarray[Any, Any]]) -> str:
    """Write the index of documents of these lengths, [n] int32 arrays one after the other; returns its SHA-256."""
    count = sum(len(part) for part in lengths)
    file = HashedFile(path)
    try:
        file.write(_HEADER + struct.pack("<QBQQ", 1, _CODES[dtype], count, count + 1))
        for chunk in _chunks(lengths):
            file.write(chunk.tobytes())
        place = 0
        for chunk in _chunks(lengths):
            ends = place + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate(([place], ends[:-1])).astype(np.int64).tobytes())
            place = int(ends[-1])
        for start in range(0, count + 1, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, count + 1), dtype=np.int64).tobytes())
    finally:
        file.close()
    return file.sha256


def write_indexed(prefix: Path, documents: Iterable[Sequence[int]], vocab_size: int, *, eod: int) -> int:
    """Writes every document followed by `eod`, in the smallest type that holds the vocabulary.

    Returns the number of tokens written, the eods included. Raises ValueError for an id outside of the
    vocabulary, OSError when the files cannot be written.
    """
    writer = IndexedWriter(prefix, token_type(vocab_size))
    try:
        for number, document in enumerate(documents):
            ids = np.asarray([*document, eod], dtype=np.int64)
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"document {number} has a token id outside of 0..{vocab_size - 1}")
            writer.add(ids)
    except BaseException:
        writer.close()
        raise
    writer.finish()
    return writer.tokens


def _chunks(parts: Sequence[np.ndarray[Any, Any]]) -> Iterator[np.ndarray[Any, Any]]:
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            yield part[start : start + _CHUNK]
