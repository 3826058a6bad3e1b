"""The random state in a checkpoint, to compare that of a resumed run with that of an undisturbed one."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader


def random_state(checkpoint: Path) -> dict[str, Any]:
    """Every generator's state by the key of its ranks and its name; tensors and arrays as lists."""
    states: dict[str, Any] = {}
    for key, piece in FileSystemReader(checkpoint).read_metadata().storage_data.items():
        if key.fqn.startswith("rng_state"):
            with open(checkpoint / piece.relative_path, "rb") as file:
                file.seek(piece.offset)
                stored = torch.load(io.BytesIO(file.read(piece.length)), weights_only=False)
            states[key.fqn] = _plain(stored)
    assert states
    return states


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
