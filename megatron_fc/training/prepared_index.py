"""Runs that trust `megatron-fc data index`: Megatron's options that look for no index, and load it when it is read.

`dataloader_fast_cache_load` leaves out the wait of all ranks for the first and what they look up in the files of the
data; `dataloader_defer_npy_index_mmap` maps an index at its first sample. Megatron takes for granted that all indexes
are there, and would meet one that is not in a worker of the loader.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_fc.errors import UserError
from megatron_fc.training.data_files import OF_A_PREPARED_INDEX
from megatron_fc.training.token_data import TokenDataConfig, TokenDataset


def trusts_index(args: Namespace) -> bool:
    """Return whether a run takes its index for granted."""
    return any(getattr(args, name) for name in OF_A_PREPARED_INDEX)


def refuse_without_index(
    args: Namespace, config: TokenDataConfig, sample_counts: Any, built_here: Callable[[], bool]
) -> None:
    """Let the first rank look whether a run's index is there; all ranks call it.

    Args:
        config: of the run's data sets.
        sample_counts, built_here: as Megatron's builder takes them.

    Raises:
        UserError: a file is missing; on all ranks.
    """
    # Sets that load nothing know the names of their files.
    named = copy(config)
    named.fast_cache_load, named.defer_npy_index_mmap = False, True
    sets = BlendedMegatronDatasetBuilder(TokenDataset, sample_counts, built_here, named).build()
    missing: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        missing = [next((path for path in _files(sets) if not os.path.isfile(path)), None)]
    torch.distributed.broadcast_object_list(missing, src=0)
    if missing[0] is not None:
        chosen = next(name for name in OF_A_PREPARED_INDEX if getattr(args, name))
        raise UserError(
            f"{chosen} wants the order of all samples beforehand, and {missing[0]} does not exist: run "
            f"`megatron-fc data index` with this run's config and words first"
        )


def _files(data: Any) -> Iterator[str]:
    """Yield the paths of indexes that nested data sets will read."""
    if isinstance(data, list):
        for inner in data:
            yield from _files(inner)
    elif isinstance(data, BlendedDataset):
        yield from (data.path_to_dataset_index, data.path_to_dataset_sample_index)
        yield from _files(data.datasets)
    elif data is not None:
        yield from (data.path_to_document_index, data.path_to_sample_index, data.path_to_shuffle_index)
