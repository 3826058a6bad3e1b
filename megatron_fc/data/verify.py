"""`megatron-fc data verify`: files against their manifest, byte for byte and token for token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fc.data.job import SPLITS
from megatron_fc.data.look import document_text
from megatron_fc.data.sources import Source, open_source
from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import load_tokenizer
from megatron_fc.training.indexed_files import IndexedFiles
from megatron_fc.training.manifests import folder_of, read_manifest, refuse_other_sizes

_CHUNK = 1 << 24  # bytes that are read together


def verify(folder: Path, *, sources: bool, report: Callable[[str], None]) -> None:
    """Read all files of a manifest, whose memory does not grow with them.

    Args:
        sources: read the sources, too, and compare their hashes.
        report: gets a line per split, and a document of each, decoded.

    Raises:
        UserError: the first thing that does not fit.
    """
    folder = folder_of(folder)
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", f"the tokenizer {folder / 'tokenizer'}")
    for split in SPLITS:
        listed = manifest["files"][split]
        for file in listed:
            _verify_files(folder / file["prefix"], file, manifest)
        if listed:
            documents, tokens = (sum(file[name] for file in listed) for name in ("documents", "tokens"))
            report(f"{split}: {len(listed):,} pairs of files, {documents:,} documents, {tokens:,} tokens: all right")
            shown = document_text(folder / listed[0]["prefix"], 0, tokenizer)
            report(f"{split}, first document: {shown[:200]!r}")
    if not any(manifest["files"].values()):
        report("no documents, and no files")
    if sources:
        for source in manifest["sources"]:
            _verify_source(source)
        report(f"{len(manifest['sources']):,} sources: all right")


def _verify_files(prefix: Path, said: dict[str, Any], manifest: dict[str, Any]) -> None:
    setting = str(prefix)
    refuse_other_sizes(setting, said)
    files = IndexedFiles.read(setting, setting)
    files.refuse_damage(None)
    vocabulary, start = manifest["tokenizer"]["vocabulary"], 0
    for chunk in _chunks(f"{prefix}.bin", said["sha256"]["bin"]):
        ids = np.frombuffer(chunk, files.dtype)
        _refuse_foreign(ids, start, prefix, vocabulary)
        start += ids.size
    for _ in _chunks(f"{prefix}.idx", said["sha256"]["idx"]):
        pass
    for name, found in (("documents", files.ends - 1), ("tokens", files.tokens)):
        if found != said[name]:
            raise UserError(f"{prefix} has {found:,} {name}, and {said[name]:,} by the manifest: make it again")


def _chunks(path: str, sha256: str) -> Iterator[bytes]:
    """Yield a file's content, and compare it with its hash at the end."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != sha256:
        raise UserError(f"{path} is not what the manifest says, its SHA-256 differs: copy or make it again")


def _refuse_foreign(ids: np.ndarray[Any, Any], start: int, prefix: Path, vocabulary: int) -> None:
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        at = int(wrong.argmax())
        raise UserError(
            f"{prefix}.bin has the token {int(ids[at]):,} at {start + at:,}, and the vocabulary has {vocabulary:,}"
        )


def _verify_source(said: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    with open_source(Source(said["path"], said["size"])) as stored:
        while chunk := stored.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != said["sha256"]:
        raise UserError(f"{said['path']} has changed since it was tokenized: its SHA-256 differs")
