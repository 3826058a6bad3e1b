"""Integrity of a checkpoint on disk: its files are checked at once, their content before Megatron reads it.

`.metadata`, the index, says which bytes of which file hold which piece of a tensor. Every piece is an archive of
torch.save with a checksum for each record. torch.load does not compare them: a flipped bit would train on as a weight.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError

INDEX = ".metadata"
_NAME = re.compile(r"iter_[0-9]{7,}")
_FORMAT = "metadata.json"  # Megatron's note that the folder is a torch_dist checkpoint
_COMMON = "common_state"  # what is no tensor; it is read before a model is built


@dataclass(frozen=True)
class _Piece:
    """Where a piece of a tensor, or one object, lies."""

    key: str
    file: Path
    offset: int
    length: int


def refuse_damaged(checkpoint: Path) -> None:
    """Check that a checkpoint's files are complete, which reads little more than its index.

    Raises:
        UserError: names the damaged file and the checkpoint to use instead.
    """
    if damage := _damage(checkpoint):
        raise UserError(f"{damage}: {way_on(checkpoint)}")


def refuse_corrupt(
    checkpoint: Path, of: Callable[[str], bool] = lambda _: True, remedy: Callable[[Path], str] | None = None
) -> None:
    """Check that everything in a checkpoint has its checksum; every rank calls it and reads its share.

    Args:
        checkpoint: its folder.
        of: true for the keys that are read later; the others may be corrupt.
        remedy: says what to do without a checkpoint, None for `way_on`.

    Raises:
        UserError: on all ranks; names the corrupt file and the remedy.
    """
    import torch

    if not (checkpoint / INDEX).exists():
        return  # of another format
    ranks = torch.distributed.get_world_size()
    share = [piece for piece in _pieces(checkpoint) if of(piece.key)][torch.distributed.get_rank() :: ranks]
    found: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(found, next(filter(None, map(_corruption, share)), None))
    if damages := list(filter(None, found)):
        raise UserError(f"{damages[0]}: {(remedy or way_on)(checkpoint)}")


def iteration_folders(folder: Path) -> list[Path]:
    """Return the folders below `folder` that Megatron named after an iteration, the newest first.

    Copies that people make (`iter_0000005.bak`), files and other names are no checkpoints of the run.
    """
    found = [path for path in folder.glob("iter_*") if _NAME.fullmatch(path.name)]
    named = (path for path in found if path.name == f"iter_{step_of(path):07d}" and path.is_dir())
    return sorted(named, key=step_of, reverse=True)


def intact_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of the complete `torch_dist` checkpoints below `folder`, the newest first."""
    return [path for path in iteration_folders(folder) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether a `torch_dist` checkpoint has all its files, in full length."""
    return (checkpoint / INDEX).exists() and _damage(checkpoint) is None


def way_on(checkpoint: Path) -> str:
    """Say what to do without this checkpoint."""
    others = [path for path in intact_checkpoints(checkpoint.parent) if path != checkpoint]
    if not others:
        return "there is no other intact checkpoint, restore it from a copy or start anew in another folder"
    return f"go on from {others[0]}, the newest intact one (train: ckpt_step={step_of(others[0])})"


def step_of(checkpoint: Path) -> int:
    """The iteration after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("iter_"))


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words."""
    index, format_note = checkpoint / INDEX, checkpoint / _FORMAT
    if not index.exists():
        if any(checkpoint.glob("mp_rank_*")):
            return None  # Megatron's older format has no index
        return f"{index} is missing"
    try:
        pieces = _pieces(checkpoint)
    except Exception as error:  # unpickling damaged bytes raises whatever they happen to mean
        return f"{index} is damaged ({type(error).__name__})"
    needed: dict[Path, int] = {}
    for piece in pieces:
        needed[piece.file] = max(needed.get(piece.file, 0), piece.offset + piece.length)
    for file, length in needed.items():
        if not file.exists():
            return f"{file} is missing"
        if (size := file.stat().st_size) < length:
            return f"{file} is truncated, it has {size:,} of {length:,} bytes"
    common = [piece for piece in pieces if piece.key.startswith(_COMMON)]
    if common and not _is_json(format_note):
        return f"{format_note} is missing or damaged"
    return next(filter(None, map(_corruption, common)), None)


def _pieces(checkpoint: Path) -> list[_Piece]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    index: Any = FileSystemReader(checkpoint).read_metadata()
    return [
        _Piece(key.fqn, checkpoint / info.relative_path, info.offset, info.length)
        for key, info in index.storage_data.items()
    ]


def _corruption(piece: _Piece) -> str | None:
    try:
        with open(piece.file, "rb") as file:
            file.seek(piece.offset)
            archive = zipfile.ZipFile(io.BytesIO(file.read(piece.length)))
        is_intact = archive.testzip() is None
    except Exception:  # a damaged header, too, may mean anything
        is_intact = False
    return None if is_intact else f"{piece.file} is corrupt at {piece.key}"


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
