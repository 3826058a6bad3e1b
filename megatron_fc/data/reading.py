"""Documents of a source file, and what is no document: bad lines are handed on one by one, never skipped.

datatrove's readers drop a line that is not JSON or has no text with a word in a log, and the rest of a file at the
first byte that is not UTF-8; so the lines are read here. pyarrow unpacks: it reads archives of several parts, and
notices one that is cut.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fc.data.sources import Source, open_source
from megatron_fc.errors import UserError

_BUFFER = 1 << 20
_ROWS = 256  # of parquet that are decoded together
_KEPT = 1 << 16  # bytes of a bad line that are kept

BAD_KINDS = {
    "json": "no JSON object",
    "field": "no text field",
    "type": "text that is no string",
    "utf8": "not UTF-8",
    "empty": "empty",
    "long": "over the length limit",
    "tokenizer": "refused by the tokenizer",
}


@dataclass(frozen=True)
class Document:
    """A text and the other fields that came with it; `number` counts lines or rows of the source from 1."""

    number: int
    text: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """What is no document: one of BAD_KINDS, and its beginning as it was, bytes that are no UTF-8 as surrogates."""

    number: int
    kind: str
    content: str


class Reader:
    """Reads one source from its beginning to its end.

    Args:
        source: the file.
        text_field: of a JSON object, or column, that holds the text; `a.b` is field b of a.
        limit: bytes of the longest line, or text of a row, that is taken.
        others: names of fields that are read, too; a line of JSON has all of its own.

    Attributes:
        bytes_read: of the file as stored, so far.
    """

    def __init__(self, source: Source, text_field: str, limit: int, others: Sequence[str] = ()) -> None:
        self.source, self._path, self._limit, self._others = source, text_field.split("."), limit, others
        self._hash, self.bytes_read = hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        """Of the file as stored, once everything has been read."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Document | BadLine]:
        """Yield what the file holds, in order.

        Raises:
            UserError: the file is broken, gone or has another size, or the column is missing.
        """
        import pyarrow as pa

        try:
            with open_source(self.source) as stored:
                yield from self._rows(stored) if self.source.kind == "parquet" else self._lines(stored)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.source.path} is broken: {error}: get it again") from None

    def _lines(self, stored: Any) -> Iterator[Document | BadLine]:
        import pyarrow as pa

        raw: Any = pa.PythonFile(_Watched(stored, self._seen), mode="r")
        if self.source.compression:
            raw = pa.CompressedInputStream(raw, self.source.compression)
        with io.BufferedReader(raw, _BUFFER) as stream:
            if self.source.kind == "text":
                text = stream.read(self._limit + 1)
                while len(text) > self._limit and stream.read(_BUFFER):
                    pass  # to its end, for the hash
                yield self._checked(1, text, {}) if len(text) <= self._limit else _bad(1, "long", text)
                return
            number = 0
            while line := stream.readline(self._limit + 1):
                number += 1
                if len(line) > self._limit and not line.endswith(b"\n"):
                    yield _bad(number, "long", line)
                    while (rest := stream.readline(_BUFFER)) and not rest.endswith(b"\n"):
                        pass
                else:
                    yield self._parsed(number, line)

    def _parsed(self, number: int, line: bytes) -> Document | BadLine:
        import orjson

        if not line.strip():
            return _bad(number, "empty", line)
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            return _bad(number, "json" if _is_utf8(line) else "utf8", line)
        if not isinstance(fields, dict):
            return _bad(number, "json", line)
        text: Any = fields
        for name in self._path:
            if not isinstance(text, dict) or name not in text:
                return _bad(number, "field", line)
            text = text[name]
        if not isinstance(text, str):
            return _bad(number, "type", line)
        return Document(number, text, fields) if text.strip() else _bad(number, "empty", line)

    def _checked(self, number: int, content: bytes | None, fields: dict[str, Any]) -> Document | BadLine:
        if content is None:
            return _bad(number, "field", b"")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return _bad(number, "utf8", content)
        return Document(number, text, fields) if text.strip() else _bad(number, "empty", content)

    def _rows(self, stored: Any) -> Iterator[Document | BadLine]:
        import pyarrow.parquet as pq

        while block := stored.read(_BUFFER):  # its parts are read in another order than they lie
            self._hash.update(block)
        stored.seek(0)
        # Column by column in small pieces: by default all that is stored of a column lies in memory.
        with pq.ParquetFile(stored, buffer_size=_BUFFER, pre_buffer=False) as file:
            kind = text_type(file.schema_arrow, self._path, self.source.path)
            refuse_missing_columns(file.schema_arrow, self._others, self.source.path)
            number, step = 0, self.source.size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_ROWS, columns=[self._path[0], *self._others]):
                column = batch.column(self._path[0])
                for name in self._path[1:]:
                    column = column.field(name)
                others = {name: batch.column(name) for name in self._others}
                # As bytes: one row that is no UTF-8 would take its whole batch along.
                for row, text in enumerate(column.cast(kind)):
                    number += 1
                    content = text.as_py()
                    if content is not None and len(content) > self._limit:
                        yield _bad(number, "long", content)
                    else:
                        yield self._checked(number, content, {name: rows[row].as_py() for name, rows in others.items()})
                self.bytes_read = int(number * step)

    def _seen(self, block: bytes) -> None:
        self._hash.update(block)
        self.bytes_read += len(block)


def text_type(schema: Any, path: list[str], name: str) -> Any:
    """Return the type of bytes that a column of strings can be seen as.

    Raises:
        UserError: the column is missing, or holds something else.
    """
    import pyarrow as pa

    kind = pa.struct(list(schema))
    for step in path:
        names = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if step not in names:
            raise UserError(
                f"{name} has no column {'.'.join(path)}: give --text-field one of {', '.join(_columns(schema))}"
            )
        kind = kind.field(step).type
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return pa.binary()
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return pa.large_binary()
    raise UserError(
        f"{name}: column {'.'.join(path)} is {kind} and no text: give --text-field the column of strings in it"
    )


def refuse_missing_columns(schema: Any, others: Sequence[str], name: str) -> None:
    """Raises UserError where the file of this name lacks a column that a filter reads."""
    for column in others:
        if column not in schema.names:
            raise UserError(f"{name} has no column {column}: leave out the filter that reads it")


def _columns(schema: Any) -> list[str]:
    import pyarrow as pa

    return [
        f"{field.name}.{inner.name}" if inner is not None else field.name
        for field in schema
        for inner in (field.type if pa.types.is_struct(field.type) else [None])
    ]


class _Watched(io.RawIOBase):
    """A stream that shows what is read from it."""

    def __init__(self, stream: Any, seen: Any) -> None:
        self._stream, self._shown = stream, seen

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(size)
        self._shown(block)
        return block


def _bad(number: int, kind: str, content: bytes) -> BadLine:
    return BadLine(number, kind, content[:_KEPT].decode("utf-8", "surrogateescape"))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
