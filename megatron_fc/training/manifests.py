"""The manifest beside data that `megatron-fc data tokenize` made: which tokenizer made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError

BUILDER = "megatron-fc data tokenize"
MANIFEST = "manifest.json"


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
    return said


def manifest_of(prefix: str) -> dict[str, Any] | None:
    """Return the manifest that lists the files of a prefix, None where there is none beside them."""
    path = Path(prefix).parent / MANIFEST
    try:
        said = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}: make the data again, or remove it") from None
    if not isinstance(said, dict) or said.get("builder") != BUILDER:
        return None
    return said if listed(said, Path(prefix).name) else None


def listed(manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return what a manifest says of the files of this name."""
    return next((file for files in manifest["files"].values() for file in files if file["prefix"] == name), None)


def refuse_other_sizes(prefix: str, said: dict[str, Any]) -> None:
    """Compare files with what their manifest says of them, by size.

    Raises:
        UserError: they are others.
    """
    for kind, size in said["bytes"].items():
        found = Path(f"{prefix}.{kind}").stat().st_size
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
