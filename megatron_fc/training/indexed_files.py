"""Megatron's indexed files, `<prefix>.idx` and `<prefix>.bin`: whether the one describes the other.

`.idx` has a header, then the length [n] int32 and the place [n] int64 of each sequence in `.bin`, in bytes, and the end
[d] int64 of each document, counted in sequences, with a 0 before the first. Megatron reads it without a look at `.bin`.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

from megatron_fc.errors import UserError

_DEMO = "/data/demo/"  # where `megatron-fc data demo` writes
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 22  # entries that are looked at together
_WINDOW, _SCANNED = 1 << 16, 1 << 24  # bytes of one look into .bin, and of all


@dataclass(frozen=True)
class IndexedFiles:
    """A data set whose sizes fit each other.

    Attributes:
        prefix: path without `.idx` and `.bin`, as the setting names it.
        setting: that names it, e.g. `data_path=/data/train`.
        dtype: of a token.
        sequences, ends: entries of the index, n and d.
        tokens: in `.bin`.
        version: changes when `.idx` is replaced, what Megatron caches of it is valid for one.
    """

    prefix: str
    setting: str
    dtype: np.dtype[Any]
    sequences: int
    ends: int
    tokens: int
    version: str

    @classmethod
    def read(cls, prefix: str, setting: str) -> "IndexedFiles":
        """Read the header, and check what does not grow with the data.

        Raises:
            UserError: a file is missing, empty, cut, no such file or not that of the other.
        """
        idx, bin_ = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
        for file in (idx, bin_):
            if not file.is_file():
                raise missing(file, setting)
            if not os.access(file, os.R_OK):
                raise UserError(f"{setting}: {file} cannot be read: change who may")
        with idx.open("rb") as stream:
            head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_INDEX_HEADER):
            raise _damaged(setting, f"{idx} is no index of Megatron's, it does not begin as one")
        _, version, code, sequences, ends = _HEADER.unpack(head)
        try:
            dtype = np.dtype(DType.dtype_from_code(code))
        except ValueError:
            dtype = np.dtype(float)
        if version != 1 or dtype.kind not in "iu":
            raise _damaged(setting, f"{idx} has version {version} and type {code}, no index of tokens")
        stat = idx.stat()
        size, wanted = stat.st_size, _HEADER.size + 12 * sequences + 8 * ends
        if size not in (wanted, wanted + sequences):  # the latter with a mode per sequence
            raise _damaged(setting, f"{idx} has {size:,} bytes, and {wanted:,} by its header")
        tokens, rest = divmod(bin_.stat().st_size, dtype.itemsize)
        files = cls(prefix, setting, dtype, sequences, ends, tokens, f"{size}-{stat.st_mtime_ns}")
        if not sequences or not tokens:
            raise _damaged(setting, f"{idx} and {bin_} hold no token")
        end = int(files._pointers[-1]) + int(files.lengths[-1]) * dtype.itemsize
        if rest or end != tokens * dtype.itemsize:
            raise _damaged(setting, f"{bin_} has {bin_.stat().st_size:,} bytes, and {end:,} by {idx.name}")
        if ends < 1 or files._document_ends[0] != 0 or files._document_ends[-1] != sequences:
            raise _damaged(setting, f"the documents of {idx} do not end where its {sequences:,} sequences end")
        return files

    def fingerprint(self, vocabulary: int | None) -> str:
        """Of what `refuse_damage` looks at, by sizes and times."""
        stats = [os.stat(f"{self.prefix}{suffix}") for suffix in (".idx", ".bin")]
        facts = [self.prefix, vocabulary, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def is_empty(self, begin: int, end: int) -> bool:
        """Whether these sequences have no token."""
        return not self.lengths[begin:end].any()

    def refuse_damage(self, vocabulary: int | None) -> None:
        """Read the whole index and some of the tokens, all of small data, 16 MiB of others.

        Args:
            vocabulary: rows of the model's embedding; None leaves tokens alone.

        Raises:
            UserError: an entry, or a token, cannot be.
        """
        place = 0
        for start in range(0, self.sequences, _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            wanted = place + np.concatenate(([0], np.cumsum(lengths))) * self.dtype.itemsize
            wrong = (lengths < 0) | (self._pointers[start : start + _CHUNK] != wanted[:-1])
            if wrong.any():
                sequence = start + int(wrong.argmax())
                raise self._refusal(f"sequence {sequence:,} of {self.prefix}.idx begins at a place that it cannot")
            place = int(wanted[-1])
        for start in range(0, self.ends - 1, _CHUNK):
            if (np.diff(self._document_ends[start : start + _CHUNK + 1]) < 0).any():
                raise self._refusal(f"the documents of {self.prefix}.idx do not follow each other")
        if vocabulary is not None and np.iinfo(self.dtype).max >= vocabulary:
            self._refuse_foreign_tokens(vocabulary)

    def _refuse_foreign_tokens(self, vocabulary: int) -> None:
        for start, ids in self._windows():
            wrong = (ids < 0) | (ids >= vocabulary)
            if wrong.any():
                at = int(wrong.argmax())
                raise UserError(
                    f"{self.setting}: token {start + at:,} of {self.prefix}.bin is {int(ids[at]):,}, and the model's "
                    f"vocabulary has {vocabulary:,}: give the tokenizer that made these data, or make them again"
                )

    def _windows(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Tokens of `.bin` with the number of the first: all, or equal distances apart."""
        ids = np.memmap(f"{self.prefix}.bin", self.dtype, mode="r")
        size, count = _WINDOW // self.dtype.itemsize, _SCANNED // _WINDOW
        if len(ids) <= size * count:
            yield 0, ids
            return
        for start in np.linspace(0, len(ids) - size, count).astype(int):
            yield int(start), ids[start : start + size]

    def sequence(self, number: int) -> np.ndarray[Any, Any]:
        """Return the tokens of one sequence."""
        place, count = int(self._pointers[number]), int(self.lengths[number])
        return np.fromfile(f"{self.prefix}.bin", self.dtype, count=count, offset=place)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each sequence, [n] int32, mapped."""
        return self._entries(np.int32, self.sequences, _HEADER.size)

    @property
    def _pointers(self) -> np.ndarray[Any, Any]:
        return self._entries(np.int64, self.sequences, _HEADER.size + 4 * self.sequences)

    @property
    def _document_ends(self) -> np.ndarray[Any, Any]:
        return self._entries(np.int64, self.ends, _HEADER.size + 12 * self.sequences)

    def _entries(self, dtype: Any, count: int, offset: int) -> np.ndarray[Any, Any]:
        return np.memmap(f"{self.prefix}.idx", dtype, mode="r", offset=offset, shape=(count,))

    def _refusal(self, what: str) -> UserError:
        return _damaged(self.setting, what)


def _damaged(setting: str, what: str) -> UserError:
    return UserError(f"{setting}: {what}: copy both files again, or make the data again")


def missing(file: Path, setting: str) -> UserError:
    """Return the error of a file that is not here, with the remedy where it is one of the demo's."""
    of_demo = _DEMO in f"/{file}"
    remedy = "`megatron-fc data demo` makes it, or name yours" if of_demo else "correct the path, or make it"
    return UserError(f"{setting}: {file} does not exist: {remedy}")
