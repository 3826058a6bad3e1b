"""The tensors of a torch_dist checkpoint, read one part at a time, whatever layout wrote it; no world of ranks."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata


def is_weight(key: str) -> bool:
    """Whether a key of a checkpoint is the model's, and not the optimizer's."""
    return not key.startswith(("optimizer.", "chained_"))


class StoredTensors:
    """The model's tensors in a checkpoint; those of the optimizer are left out.

    Args:
        folder: `.../iter_0000100`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = FileSystemReader(folder).read_metadata()
        self._places: Any = index.storage_data
        self._tensors = {
            key: value
            for key, value in index.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and is_weight(key)
        }

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, at: tuple[int, ...] = ()) -> Tensor:
        """Return `tensor[at]`; read are the stored pieces that have a part in it, one after another.

        Args:
            key: of the tensor.
            at: indices along its first dimensions.
        """
        stored = self._tensors[key]
        result = torch.empty(stored.size[len(at) :], dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            first = [index - offset for index, offset in zip(at, chunk.offsets, strict=False)]
            if not all(0 <= index < size for index, size in zip(first, chunk.sizes, strict=False)):
                continue
            piece = self._piece(MetadataIndex(key, chunk.offsets))[tuple(first)]
            offsets = chunk.offsets[len(at) :]
            result[tuple(slice(o, o + size) for o, size in zip(offsets, piece.shape, strict=True))] = piece
        return result

    def _piece(self, index: MetadataIndex) -> Tensor:
        place = self._places[index]
        with open(self._folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            piece: Tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        return piece
