"""A launch's CTAs: their number, what they are given, and the memory of those that run at the same time."""

from dataclasses import dataclass

import numpy as np

from laboratory.emulator.arith import KINDS, Array
from laboratory.emulator.memory import Space
from laboratory.emulator.options import Options

LANES = 32
Mask = Array | None  # which threads take part; None for all


class Constants(dict[int, Array]):
    """Registers that hold the same bits in every thread; nothing writes into a register's array."""

    def __init__(self, count: int, kind: str) -> None:
        super().__init__()
        self.count, self.kind = count, kind

    def __missing__(self, bits: int) -> Array:
        if self.kind == "p":
            value = np.full(self.count, bool(bits))
        else:
            value = np.full(self.count, bits, f"u{np.dtype(KINDS[self.kind]).itemsize}").view(KINDS[self.kind])
        self[bits] = value
        return value


@dataclass(frozen=True)
class Grid:
    """What a launch says of its CTAs."""

    size: tuple[int, int, int]
    warps: int
    shared_bytes: int
    local_bytes: int
    parameters: bytes

    def cta(self, index: int) -> tuple[int, int, int]:
        x, y, _ = self.size
        return index % x, index // x % y, index // (x * y)


class Batch:
    """CTAs that run at the same time, with their shared and local memory."""

    def __init__(self, grid: Grid, ctas: Array, options: Options) -> None:
        self.grid, self.ctas, self.traffic = grid, ctas, options.traffic
        known = options.uninitialised == "zero"
        self.shared_stride = -(-max(grid.shared_bytes, 1) // 128) * 128
        self.local_stride = -(-max(grid.local_bytes, 1) // 16) * 16
        self.shared = Space(self.shared_stride * len(ctas), known)
        self.local = Space(self.local_stride * len(ctas) * grid.warps * LANES, known)
        if options.uninitialised == "error":
            self.shared.watch()
            self.local.watch()
