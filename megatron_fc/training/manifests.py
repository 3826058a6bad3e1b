"""The manifest beside data that `megatron-fc data tokenize` made: which tokenizer made them."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError

BUILDER = "megatron-fc data tokenize"
MANIFEST = "manifest.json"


def folder_of(path: Path) -> Path:
    """Return the folder of data, given it or its manifest's path."""
    return path.parent if path.name == MANIFEST else path


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest, given its path or its folder's.

    Raises:
        UserError: there is none.
    """
    path = path / MANIFEST if path.is_dir() else path
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        unfinished = (path.parent / "job.json").exists()
        remedy = "the same `megatron-fc data tokenize` again finishes it" if unfinished else "give a finished folder"
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise UserError(f"the manifest {path} cannot be read, {reason}: {remedy}") from None
    if not isinstance(said, dict) or said.get("builder") != BUILDER:
        raise UserError(f"{path} is no manifest of `{BUILDER}`")
    _refuse_incomplete(said, path)
    return said


def manifest_of(prefix: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the manifest beside the files of a prefix and what it says of them, None where none lists them."""
    path = Path(prefix).parent / MANIFEST
    try:
        stat = path.stat()
        said, files = _read_once(path, (stat.st_size, stat.st_mtime_ns))
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}: make the data again, or remove it") from None
    file = files.get(Path(prefix).name)
    return None if file is None else (said, file)


@lru_cache(maxsize=100)
def _read_once(path: Path, version: tuple[int, int]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return a manifest and its files by name, none if it is not ours; a blend asks for each of thousands of files."""
    said = json.loads(path.read_text("utf-8"))
    if not isinstance(said, dict) or said.get("builder") != BUILDER:
        return {}, {}
    _refuse_incomplete(said, path)
    return said, {file["prefix"]: file for files in said["files"].values() for file in files}


def _refuse_incomplete(said: dict[str, Any], path: Path) -> None:
    """Raises UserError where entries that others read are missing, e.g. after an edit."""
    needed = {"prefix", "documents", "tokens", "text_bytes", "bytes", "sha256"}
    try:
        files = [set(file) for split in ("train", "valid") for file in said["files"][split]]
        is_whole = {"name", "sha256", "vocabulary"} <= set(said["tokenizer"]) and all(needed <= file for file in files)
    except (KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"the manifest {path} lacks entries: copy it again, or make the data again")


def refuse_other_sizes(prefix: str, said: dict[str, Any]) -> None:
    """Compare files with what their manifest says of them, by size.

    Raises:
        UserError: they are others.
    """
    for kind, size in said["bytes"].items():
        path = Path(f"{prefix}.{kind}")
        if not path.exists():
            raise UserError(f"{path} does not exist, and {MANIFEST} beside it lists it: copy it, or make it again")
        found = path.stat().st_size
        if found != size:
            raise UserError(
                f"{prefix}.{kind} has {found:,} bytes, and {size:,} by {MANIFEST} beside it: copy both again, or make "
                f"the data again"
            )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer of transformers, which is the same for all that give the same tokens by name.

    Padding and cutting are no part of it.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["truncation"] = said["padding"] = None
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
