"""Writes token documents in Megatron's indexed format: `<prefix>.bin` (ids) and `<prefix>.idx` (index)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)


def write_indexed(prefix: Path, documents: Iterable[Sequence[int]], vocab_size: int, *, eod: int) -> int:
    """Writes every document followed by `eod`, in the smallest type that holds the vocabulary.

    Returns the number of tokens written, the eods included. Raises ValueError for an id outside of the
    vocabulary, OSError when the files cannot be written.
    """
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=dtype)
    tokens = 0
    with closing(builder.data_file):
        for number, document in enumerate(documents):
            ids = np.asarray([*document, eod], dtype=np.int64)
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"document {number} has a token id outside of 0..{vocab_size - 1}")
            builder.add_document(torch.from_numpy(ids), [ids.size])
            tokens += ids.size
        builder.finalize(get_idx_path(str(prefix)))
    return tokens
