"""Bytes that compiled kernels move between memory and cache, counted in the emulator.

A kernel reads its tile a second time, and adds to sums that it has touched before: a small cache stands for the one
that such accesses hit on a GPU.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from laboratory.emulator.driver import Emulator

SECTOR = 32  # bytes that a GPU moves at once; no access is larger
# Half of a processor's share in the second-level cache of an H100, 50 MB for 132: for forward, of which a processor
# runs two programs, and for backward, since how much of the cache holds for one processor is not known.
CACHE = 50_000_000 // 264 // SECTOR


class Cache:
    """The bytes that a program moves, by address: least recently used sectors make room, written ones count once."""

    def __init__(self, moved: Counter[int]) -> None:
        self.moved = moved
        self._written: OrderedDict[int, bool] = OrderedDict()  # by sector that is in the cache

    def touch(self, addresses: np.ndarray, writes: bool) -> None:
        for sector in np.unique(addresses // SECTOR).tolist():
            written = self._written.pop(sector, None)
            if (written is None and not writes) or (writes and not written):
                self.moved[sector * SECTOR] += SECTOR
            self._written[sector] = writes or bool(written)
            if len(self._written) > CACHE:
                self._written.popitem(last=False)


@contextmanager
def counted(emulator: Emulator) -> Iterator[Counter[int]]:
    """Bytes moved, by the address that they were moved from or to."""
    moved: Counter[int] = Counter()
    caches: dict[tuple[int, int], Cache] = {}  # by launch and program

    def touch(programs: np.ndarray, addresses: np.ndarray, size: int, writes: bool) -> None:
        for program in np.unique(programs).tolist():
            cache = caches.setdefault((len(emulator.launches), program), Cache(moved))
            cache.touch(addresses[programs == program], writes)

    before = emulator.options
    emulator.options, emulator.kept = replace(before, traffic=touch), []
    try:
        yield moved
    finally:
        emulator.options, emulator.kept = before, None


def of(moved: Counter[int], *tensors: torch.Tensor | None) -> int:
    """Bytes moved from or to the storages of these tensors."""
    total = 0
    for tensor in tensors:
        assert tensor is not None
        start = tensor.data_ptr()
        total += sum(n for address, n in moved.items() if start <= address < start + tensor.nbytes)
    return total
