"""Exchange between the lanes of a warp: shuffles, votes, reductions."""

from typing import Any

import numpy as np

from laboratory.emulator.arith import U32, Array
from laboratory.emulator.grid import LANES, Mask
from laboratory.emulator.threads import Threads


class Lanes(Threads):
    """Threads whose lanes read each other's registers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._shuffles: dict[tuple[str, int, int], tuple[Array, Array]] = {}

    def shuffle_from(self, mode: str, distance: Array, bounds: Array) -> tuple[Array, Array]:
        """Which thread's value each one gets, and whether the lane it asked for is within bounds."""
        segment = (bounds >> U32(8) & U32(31)).astype(np.int64)
        clamp, by = (bounds & U32(31)).astype(np.int64), (distance & U32(31)).astype(np.int64)
        lowest = self.lane & segment
        highest = lowest | (clamp & ~segment)
        if mode == "up":
            wanted = self.lane - by
            inside = wanted >= highest
        else:
            wanted = {"down": self.lane + by, "bfly": self.lane ^ by, "idx": lowest | (by & ~segment)}[mode]
            inside = wanted <= highest
        return self.first_lane + np.where(inside, wanted, self.lane), inside

    def shuffle_constant(self, mode: str, distance: int, bounds: int) -> tuple[Array, Array]:
        key = (mode, distance, bounds)
        if key not in self._shuffles:
            self._shuffles[key] = self.shuffle_from(mode, self.k["u32"][distance], self.k["u32"][bounds])
        return self._shuffles[key]

    def ballot(self, values: Array, mask: Mask) -> Array:
        here = values if mask is None else values & mask
        bits = np.packbits(here.reshape(-1, LANES), axis=1, bitorder="little").view(U32)
        return np.repeat(bits.reshape(-1), LANES)

    def vote(self, mode: str, values: Array, mask: Mask) -> Array:
        here = (values if mask is None else values | ~mask if mode == "all" else values & mask).reshape(-1, LANES)
        if mode == "uni":
            return np.repeat(here.all(axis=1) | ~here.any(axis=1), LANES)
        return np.repeat(here.all(axis=1) if mode == "all" else here.any(axis=1), LANES)

    def reduce(self, operation: str, values: Array, members: Array) -> Array:
        """redux.sync over the lanes of each warp that are members."""
        functions: dict[str, np.ufunc] = {"add": np.add, "min": np.minimum, "max": np.maximum}
        functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        member = (members >> self.lane.astype(U32) & U32(1)).astype(bool).reshape(-1, LANES)
        limits = np.iinfo(values.dtype)
        neutral = {"min": limits.max, "max": limits.min, "and": U32(0xFFFFFFFF).astype(values.dtype)}.get(operation, 0)
        rows = np.where(member, values.reshape(-1, LANES), values.dtype.type(neutral))
        return np.repeat(functions[operation].reduce(rows, axis=1, dtype=values.dtype), LANES)

    def elected(self, members: Array) -> Array:
        """The lowest member of each warp."""
        return members & (~members + U32(1)) == U32(1) << self.lane.astype(U32)

    def synchronise_warps(self, mask: Mask) -> None:
        if self.races is not None:
            self.races[0].clock.pass_warp_barrier(np.unique((self.ids if mask is None else self.ids[mask]) // LANES))
