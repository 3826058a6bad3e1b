"""The files that are tokenized: found by their endings, in folders here or on file systems that fsspec knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fc.errors import UserError

_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


@dataclass(frozen=True)
class Source:
    """A file with documents.

    Attributes:
        path: a path here, or a URL such as hf://datasets/owner/name/file.parquet.
        size: in bytes, as stored.
    """

    path: str
    size: int

    @property
    def kind(self) -> str:
        """`jsonl`, one document per line; `parquet`, one per row; `text`, one in all."""
        return kind_of(self.path)[0]

    @property
    def compression(self) -> str | None:
        """Of a stream; what parquet compresses is its own matter."""
        return kind_of(self.path)[1]


def kind_of(path: str) -> tuple[str, str | None]:
    """Return kind and compression by the ending, the kind empty where no ending is known."""
    base, compression = path, None
    for ending, name in _COMPRESSIONS.items():
        if path.endswith(ending):
            base, compression = path.removesuffix(ending), name
    return next((kind for ending, kind in _KINDS.items() if base.endswith(ending)), ""), compression


def find(inputs: Iterable[str]) -> tuple[list[Source], list[str]]:
    """Return the sources of files, folders and patterns in the order of their paths, and what is left out.

    Raises:
        UserError: an input does not exist or holds no document, or two are the same file.
    """
    found: dict[str, Source] = {}
    left_out: list[str] = []
    for word in inputs:
        listed = _listed(word)
        mine = [source for source in listed if kind_of(source.path)[0]]
        if not mine:
            known = ", ".join(_KINDS)
            raise UserError(f"{word} holds no file with documents: they end in {known}, and {', '.join(_COMPRESSIONS)}")
        for source in mine:
            if source.path in found:
                raise UserError(f"{source.path} is named twice: leave one out")
            found[source.path] = source
        left_out += [source.path for source in listed if source not in mine]
    return [found[path] for path in sorted(found)], sorted(left_out)


def open_source(source: Source) -> Any:
    """Open the stored bytes.

    Raises:
        UserError: the file is gone or has another size than at the job's start.
    """
    filesystem, path = _filesystem(source.path)
    try:
        size = filesystem.info(path)["size"]
        stream = filesystem.open(path, "rb")
    except OSError as error:
        raise UserError(f"{source.path} cannot be read: {error.strerror or error}") from None
    if size != source.size:
        stream.close()
        raise UserError(
            f"{source.path} has {size:,} bytes, and had {source.size:,} when this job began: tokenize it into a new "
            f"folder"
        )
    return stream


def shard(sources: Sequence[Source], task: int, tasks: int) -> Sequence[Source]:
    """Return those of one task, as datatrove deals files out."""
    return sources[task::tasks]


def _listed(word: str) -> list[Source]:
    filesystem, path = _filesystem(word)
    is_local = "://" not in word
    try:
        if filesystem.isfile(path):
            infos = {path: filesystem.info(path)}
        elif filesystem.isdir(path):
            infos = filesystem.find(path, detail=True)
        else:
            infos = filesystem.glob(path, detail=True) if any(sign in path for sign in "*?[") else {}
    except OSError as error:
        raise UserError(f"{word} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # elsewhere, each library has its own
        raise UserError(f"{word} cannot be read: {type(error).__name__}, {error}") from None
    files = {name: info for name, info in infos.items() if info["type"] == "file"}
    if not files:
        raise UserError(f"{word} does not exist, or has no files in it")
    return [
        Source(name if is_local else filesystem.unstrip_protocol(name), info["size"]) for name, info in files.items()
    ]


def _filesystem(word: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(word)
    except (ImportError, ValueError) as error:
        raise UserError(f"{word} cannot be read: {error}") from None
