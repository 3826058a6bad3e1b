"""Address spaces: bytes, which of them exist, and how arrays of the caller get addresses.

| space | addresses |
|---|---|
| global | from `GLOBAL`: the caller's arrays, each on 256 bytes, with gaps between them |
| shared | from `SHARED`, as on sm_90, where the first KiB of a CTA's is the system's |
| local | from 0 |
| generic | global as they are; shared from `SHARED_WINDOW`, local from `LOCAL_WINDOW` |
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laboratory.emulator.arith import U8, U16, U32, U64, Array
from laboratory.emulator.errors import PTXError

GLOBAL = 0x7F00_0000_0000
SHARED = 0x400
SHARED_WINDOW, LOCAL_WINDOW = 0x2000_0000_0000, 0x3000_0000_0000
WINDOW = 1 << 40
POISON = 0xFF  # of memory that nothing was written to: NaN in every format
# Items of so many bytes: complex128 is how numpy moves 16 at a time.
_ITEMS: dict[int, Any] = {1: U8, 2: U16, 4: U32, 8: U64, 16: np.complex128}


class Space:
    """Bytes that are read and written at many places at once; a place is an offset into them."""

    def __init__(self, size: int, known: bool = True) -> None:
        whole = -(-max(size, 1) // 16) * 16
        self.bytes = np.full(whole, 0 if known else POISON, U8)
        self.views = {size: self.bytes.view(item) for size, item in _ITEMS.items()}
        self.known: Array | None = None  # of each byte, whether something was written to it, where this is watched

    def watch(self) -> None:
        self.known = np.zeros(len(self.bytes), bool)

    def unknown(self, places: Array, size: int, mask: Array | None) -> Array | None:
        """Which threads read what was never written; None for none."""
        if self.known is None:
            return None
        bad = ~self.known[places[:, None] + np.arange(size)].all(axis=1)
        bad = bad if mask is None else bad & mask
        return np.flatnonzero(bad) if np.count_nonzero(bad) else None

    def read(self, places: Array, size: int, count: int) -> Array:
        """[threads], or [count, threads] for more than one element of `size` bytes."""
        total = size * count
        if total > 16:
            half = count // 2
            return np.concatenate([self.read(places, size, half), self.read(places + 16, size, half)])
        items = self.views[total][places >> _SHIFT[total]]
        return items if count == 1 else np.ascontiguousarray(items.view(_ITEMS[size]).reshape(-1, count).T)

    def write(self, places: Array, size: int, values: Sequence[Array]) -> None:
        """Of two threads that write to one place the later one wins."""
        count = len(values)
        total = size * count
        if total > 16:
            half = count // 2
            self.write(places, size, values[:half])
            self.write(places + 16, size, values[half:])
            return
        if self.known is not None:
            self.known[places[:, None] + np.arange(total)] = True
        if count == 1:
            self.views[total][places >> _SHIFT[total]] = values[0]
            return
        items = np.empty((len(places), count), _ITEMS[size])
        for i, value in enumerate(values):
            items[:, i] = value
        self.views[total][places >> _SHIFT[total]] = items.view(_ITEMS[total]).reshape(-1)


_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}


@dataclass(frozen=True)
class Region:
    """Some of global memory: an array of the caller, or several that share memory."""

    start: int  # as an offset from GLOBAL
    end: int
    name: str
    writable: bool
    host: int = 0  # where the caller has it


class GlobalMemory(Space):
    """The caller's arrays, copied in, and out again at the end."""

    def __init__(self, arrays: Sequence[tuple[str, Array]], constants: Iterable[tuple[str, bytes]]) -> None:
        for name, array in arrays:
            if not array.flags.c_contiguous:
                raise PTXError(f"{name} is not contiguous")
        self.arrays = [(name, array) for name, array in arrays if array.nbytes]
        self.regions: list[Region] = []
        self.addresses: dict[int, int] = {}  # of the caller's pointers
        self.symbols: dict[str, int] = {}
        end = 256
        for start, stop, name, writable in _merged(self.arrays):
            begin = end + start % 16  # what is misaligned stays so
            self.regions.append(Region(begin, begin + stop - start, name, writable, start))
            for _, array in self.arrays:
                if start <= array.ctypes.data < stop:
                    self.addresses[array.ctypes.data] = GLOBAL + begin + array.ctypes.data - start
            end = -(-(begin + stop - start + 64) // 256) * 256
        constants = list(constants)
        for name, data in constants:
            self.symbols[name] = GLOBAL + end
            self.regions.append(Region(end, end + len(data), name, False))
            end = -(-(end + len(data) + 64) // 256) * 256
        super().__init__(end)
        self.starts = [region.start for region in self.regions]
        self.constant = [region for region in self.regions if not region.writable]
        for name, data in constants:
            at = self.symbols[name] - GLOBAL
            self.bytes[at : at + len(data)] = np.frombuffer(data, U8)
        for _, array in self.arrays:
            self._of(array)[:] = array.reshape(-1).view(U8)

    def _of(self, array: Array) -> Array:
        at = self.addresses[array.ctypes.data] - GLOBAL
        return self.bytes[at : at + array.nbytes]

    def address(self, array: Array) -> int:
        return self.addresses.get(array.ctypes.data, GLOBAL + 64) if array.nbytes else GLOBAL + 64

    def give_back(self) -> None:
        for _, array in self.arrays:
            if array.flags.writeable:
                array.reshape(-1).view(U8)[:] = self._of(array)

    def hosts(self, places: Array) -> Array:
        """The addresses of places that are in arrays of the caller's, in the caller's memory."""
        at = np.searchsorted(np.array(self.starts), places, side="right") - 1
        return places + np.array([region.host - region.start for region in self.regions])[at]

    def holds(self, low: int, high: int) -> bool:
        """Whether one region has all of low..high."""
        at = bisect.bisect_right(self.starts, low) - 1
        return at >= 0 and high <= self.regions[at].end

    def outside(self, places: Array, size: int) -> Array:
        """Indices of the places that are in no region."""
        at = np.searchsorted(np.array(self.starts, np.int64), places, side="right") - 1
        ends = np.array([region.end for region in self.regions] or [0], np.int64)
        return np.flatnonzero((at < 0) | (places + size > ends[np.maximum(at, 0)]))

    def read_only(self, places: Array) -> Array | None:
        """Which of the places are in an array that may not be written to; None for none."""
        if not self.constant:
            return None
        inside = [(places >= region.start) & (places < region.end) for region in self.constant]
        bad = np.logical_or.reduce(inside)
        return bad if np.count_nonzero(bad) else None

    def describe(self, place: int) -> str:
        """Where an address is, for a message."""
        if not self.regions:
            return "there are no arrays"
        at = bisect.bisect_right(self.starts, place) - 1
        if at >= 0 and place < self.regions[at].end:
            return f"byte {place - self.regions[at].start} of {self.regions[at].name}"
        before = self.regions[at] if at >= 0 else None
        after = self.regions[at + 1] if at + 1 < len(self.regions) else None
        if before is not None and (after is None or place - before.end <= after.start - place):
            return f"{place - before.end} bytes past the end of {before.name}"
        assert after is not None
        return f"{after.start - place} bytes before {after.name}"


def _merged(arrays: Sequence[tuple[str, Array]]) -> list[tuple[int, int, str, bool]]:
    """Start, end and name of the memory of arrays, and whether it may be written to; those that overlap are one."""
    out: list[tuple[int, int, str, bool]] = []
    for name, array in sorted(arrays, key=lambda item: item[1].ctypes.data):
        start, writable = array.ctypes.data, array.flags.writeable
        stop = start + array.nbytes
        if out and start < out[-1][1]:
            first, last, names, also = out.pop()
            out.append((first, max(last, stop), f"{names} and {name}", also or writable))
        else:
            out.append((start, stop, name, writable))
    return out
