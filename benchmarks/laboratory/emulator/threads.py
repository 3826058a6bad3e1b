"""Threads that run in lockstep. A register is an array with an element per thread: CTA after CTA, warp after warp, lane
after lane. A mask says which threads take part; None stands for all.
"""

from collections.abc import Sequence

import numpy as np

from laboratory.emulator.arith import KINDS, Array
from laboratory.emulator.errors import Fault, PTXError
from laboratory.emulator.grid import LANES, Batch, Constants, Mask
from laboratory.emulator.memory import GlobalMemory
from laboratory.emulator.races import Races


class Threads:
    """The same warps of every CTA of a batch."""

    def __init__(self, batch: Batch, memory: GlobalMemory, warps: Sequence[int], races: tuple[Races, Races] | None):
        self.grid, self.batch, self.memory = batch.grid, batch, memory
        ctas = len(batch.ctas)
        self.shape = (ctas, len(warps) * LANES)
        self.count = ctas * len(warps) * LANES
        self.cta = np.repeat(np.arange(ctas), len(warps) * LANES)  # of the batch
        self.warp = np.tile(np.repeat(np.array(warps), LANES), ctas)
        self.lane = np.tile(np.arange(LANES), ctas * len(warps))
        self.thread = self.warp * LANES + self.lane  # of its CTA
        self.first_lane = np.arange(self.count) - self.lane
        self.shared_base = self.cta * batch.shared_stride
        self.local_base = (self.cta * batch.grid.warps * LANES + self.thread) * batch.local_stride
        self.ids = batch.ctas[self.cta] * batch.grid.warps * LANES + self.thread  # in the grid
        self.k = {kind: Constants(self.count, kind) for kind in (*KINDS, "p")}
        self.races = races

    def name(self, thread: int) -> str:
        cta = self.grid.cta(int(self.batch.ctas[self.cta[thread]]))
        return f"CTA {cta}, warp {self.warp[thread]}, lane {self.lane[thread]}"

    def both(self, mask: Mask, guard: Array) -> Mask:
        """Which threads take part of those in a mask; None for all of the machine's."""
        both = guard if mask is None else mask & guard
        return None if np.count_nonzero(both) == self.count else both

    def whole_warps(self, mask: Array, at: int) -> None:
        """An instruction of a whole warp needs all of it."""
        lanes = np.count_nonzero(mask.reshape(-1, LANES), axis=1)
        partly = (lanes != 0) & (lanes != LANES)
        if np.count_nonzero(partly):
            first = int(np.argmax(partly)) * LANES
            raise Fault(PTXError, at, f"only {lanes[first // LANES]} lanes of the warp are here", first)

    def trap(self, mask: Mask, at: int) -> None:
        if mask is None or np.count_nonzero(mask):
            raise Fault(PTXError, at, "trap", 0 if mask is None else int(np.argmax(mask)))
