"""cp.async: copies from global to shared memory, which land when they are waited for and not before."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from laboratory.emulator.access import Access
from laboratory.emulator.arith import U8, Array
from laboratory.emulator.grid import Mask


@dataclass
class _Copy:
    """A cp.async that has not landed yet."""

    mask: Array
    group: Array
    to: Array
    source: Array
    size: int
    given: Array  # bytes that come from the source; the others are zero
    at: int


class Copies(Access):
    """Threads that start copies and wait for them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._copies: list[_Copy] = []
        self._committed = np.zeros(self.count, np.int64)

    def copy_async(
        self, to: tuple[Array, int], source: tuple[Array, int], size: int, given: Array, mask: Mask, at: int
    ) -> None:
        active = np.ones(self.count, bool) if mask is None else mask
        if not np.count_nonzero(active):
            return
        places = self.shared_places(*to, size, mask, at)
        reading = self._all(active & (given > 0))
        origin = places if reading is not None and not np.count_nonzero(reading) else None
        if origin is None:
            origin = self.global_places(*source, size, reading, at)
            self.report(origin, size, reading, writes=False)
        self._copies.append(_Copy(active.copy(), self._committed.copy(), places, origin, size, given, at))

    def commit_copies(self, mask: Mask) -> None:
        self._committed = self._committed + (1 if mask is None else mask.astype(np.int64))

    def wait_for_copies(self, pending: int | None, mask: Mask) -> None:
        """Until no more than so many of the latest groups are under way; None: no copy at all, in a group or not."""
        for copy in self._copies:
            landing = copy.mask if mask is None else copy.mask & mask
            if pending is not None:
                landing = landing & (copy.group < self._committed - pending)
            if not np.count_nonzero(landing):
                continue
            values = np.zeros((self.count, copy.size), U8)
            reading = landing & (copy.given > 0)
            data = self.memory.bytes[copy.source[reading][:, None] + np.arange(copy.size)]
            values[reading] = data * (np.arange(copy.size) < copy.given[reading][:, None])
            items = values.view(self.batch.shared.views[copy.size].dtype).reshape(-1)
            self._store(self.batch.shared, 0, copy.to, copy.size, [items], landing, copy.at)
            copy.mask = copy.mask & ~landing
        self._copies = [copy for copy in self._copies if np.count_nonzero(copy.mask)]
