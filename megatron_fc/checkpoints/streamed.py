"""A torch_dist checkpoint whose tensors are made one at a time while they are written: one lies in memory.

Megatron saves what is no tensor; torch's own writer, for which Megatron's is a cover, asks for the tensors one by one.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_fc.checkpoints.integrity import INDEX
from megatron_fc.checkpoints.location import TRACKER
from megatron_fc.checkpoints.staging import staged


@dataclass(frozen=True)
class Piece:
    """A part of a global tensor.

    Attributes:
        key: of the tensor.
        shape: of the tensor.
        offset, size: of the piece.
        dtype: of both.
        make: returns the numbers, of shape `size`.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_streamed(target: Path, common: dict[str, Any], pieces: Sequence[Piece], content: dict[str, Any]) -> None:
    """Write the weights of a model, without an iteration, to the folder `target`, for Megatron's `load`.

    The folder appears when it is complete. One process calls it, in a world of its own.

    Args:
        target: folder that does not exist or is empty.
        common: what the checkpoint holds besides tensors, sharded objects included.
        pieces: all tensors, in the order in which they are made.
        content: what Megatron keeps as the content's metadata.

    Raises:
        UserError: the target exists.
    """
    with staged(target) as staging:
        folder, apart = staging / "release", staging / "tensors"
        folder.mkdir()
        dist_checkpointing.save(common, str(folder), content_metadata=content)
        writer = FileSystemWriter(apart, single_file_per_rank=True, thread_count=1)
        save({}, storage_writer=writer, planner=_Planner(pieces), no_dist=True)
        _take(apart, folder)
        shutil.rmtree(apart)
        (staging / TRACKER).write_text("release")


class _Planner(DefaultSavePlanner):
    """Plans the pieces in place of a state dict."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self._pieces = {MetadataIndex(piece.key, piece.offset): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                MetadataIndex(piece.key, piece.offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size)),
                    TensorProperties(piece.dtype),
                    torch.Size(piece.shape),
                ),
            )
            for piece in self._pieces.values()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)].make()


def _take(apart: Path, folder: Path) -> None:
    """Move the tensors' files to what Megatron has saved, and note in its index where they lie."""
    index, tensors = (FileSystemReader(place).read_metadata() for place in (folder, apart))
    index.state_dict_metadata |= tensors.state_dict_metadata
    for place, info in tensors.storage_data.items():
        info.relative_path = f"tensors{info.relative_path}"
        index.storage_data[place] = info
    for file in apart.glob("*.distcp"):
        os.rename(file, folder / f"tensors{file.name}")
    with open(folder / INDEX, "wb") as written:
        pickle.dump(index, written)
