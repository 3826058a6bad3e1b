"""Bytes that kernels move between memory and cache, counted in Triton's interpreter.

A kernel reads its tile a second time, and adds to sums that it has touched before: a small cache stands for the one
that such accesses hit on a GPU.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

SECTOR = 32  # bytes that a GPU moves at once
# Half of a processor's share in the second-level cache of an H100, 50 MB for 132: for forward, of which a processor
# runs two programs, and for backward, since how much of the cache holds for one processor is not known.
CACHE = 50_000_000 // 264 // SECTOR


class Cache:
    """Counts the bytes that a program moves, by address: least recently used sectors make room, written ones once."""

    def __init__(self) -> None:
        self.moved: Counter[int] = Counter()
        self._written: OrderedDict[int, bool] = OrderedDict()  # by sector that is in the cache

    def clear(self) -> None:
        self._written.clear()

    def touch(self, pointers: np.ndarray, mask: np.ndarray, writes: bool) -> None:
        for sector in np.unique(pointers[np.broadcast_to(mask, pointers.shape)] // SECTOR).tolist():
            written = self._written.pop(sector, None)
            if (written is None and not writes) or (writes and not written):
                self.moved[sector * SECTOR] += SECTOR
            self._written[sector] = writes or bool(written)
            if len(self._written) > CACHE:
                self._written.popitem(last=False)


@contextmanager
def counted() -> Iterator[Counter[int]]:
    """Bytes moved, by the address that they were moved from or to."""
    cache = Cache()
    builder = type(interpreter.interpreter_builder)
    load, store, begin = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

    def begin_program(self: object, *index: int) -> None:
        cache.clear()
        begin(self, *index)

    def counting_load(self: object, ptrs: object, mask: object, *rest: object) -> object:
        cache.touch(ptrs.data, mask.data, writes=False)  # type: ignore[attr-defined]
        return load(self, ptrs, mask, *rest)

    def counting_store(self: object, ptrs: object, value: object, mask: object, *rest: object) -> object:
        cache.touch(ptrs.data, mask.data, writes=True)  # type: ignore[attr-defined]
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    builder.set_grid_idx = begin_program
    try:
        yield cache.moved
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx = load, store, begin


def of(moved: Counter[int], *tensors: torch.Tensor | None) -> int:
    """Bytes moved from or to the storages of these tensors."""
    total = 0
    for tensor in tensors:
        assert tensor is not None
        start = tensor.data_ptr()
        total += sum(n for address, n in moved.items() if start <= address < start + tensor.nbytes)
    return total
