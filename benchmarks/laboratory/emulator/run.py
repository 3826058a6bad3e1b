"""One launch of a kernel on numpy arrays: its CTAs, in batches."""

import functools
from collections.abc import Sequence

import numpy as np

from laboratory.emulator.arguments import Argument, complete, pack
from laboratory.emulator.arith import Array
from laboratory.emulator.errors import PTXError
from laboratory.emulator.grid import LANES, Batch, Grid
from laboratory.emulator.machine import Machine
from laboratory.emulator.memory import SHARED, GlobalMemory
from laboratory.emulator.options import Options, Statistics
from laboratory.emulator.parse import parse
from laboratory.emulator.races import Clock, Races
from laboratory.emulator.schedule import Schedule
from laboratory.emulator.translate import Program, translate
from laboratory.emulator.unit import Progress, Unit


@functools.lru_cache(maxsize=64)
def program(text: str, rounding: str = "nearest", name: str | None = None) -> Program:
    """The translation of a kernel, made once."""
    return translate(parse(text, name), truncate=rounding == "zero")


def run(
    text: str,
    grid: Sequence[int],
    num_warps: int,
    args: Sequence[Argument],
    options: Options | None = None,
    name: str | None = None,
) -> Statistics:
    """Run a kernel on numpy arrays, which it changes in place.

    Args:
        text: PTX with one kernel, or with the one called `name`.
        grid: CTAs in up to three directions.
        num_warps: of a CTA, which is one-dimensional.
        args: in the order of the kernel's parameters. A pointer is an array, contiguous and of any type (bf16 as
            uint16), or None for a null pointer; anything else is a number. Pointers at the end may be left out, as
            Triton's scratch memory.
    """
    options = options or Options()
    with np.errstate(all="ignore"):
        return _Run(program(text, options.rounding, name), grid, num_warps, args, options).run()


class _Run:
    """One launch."""

    def __init__(
        self, program: Program, grid: Sequence[int], warps: int, args: Sequence[Argument], options: Options
    ) -> None:
        self.program, self.options, kernel = program, options, program.kernel
        if kernel.max_threads is not None and warps * LANES > kernel.max_threads:
            raise PTXError(f"{kernel.name} is for {kernel.max_threads} threads, not {warps * LANES}")
        given = complete(kernel, args)
        arrays = [
            (f"argument {n}, {value.dtype}{list(value.shape)}", value)
            for n, value in enumerate(given)
            if isinstance(value, np.ndarray)
        ]
        constants = [(array.name, array.data) for array in kernel.arrays.values() if array.space in ("global", "const")]
        self.memory = GlobalMemory(arrays, constants)
        size = (*map(int, grid), 1, 1)[:3]
        shared = max([kernel.shared_bytes, *(a.offset for a in kernel.arrays.values() if a.space == "shared")])
        self.grid = Grid(
            size=(size[0], size[1], size[2]),
            warps=warps,
            shared_bytes=shared + (options.shared if options.shared is not None else 227 * 1024 - SHARED - shared),
            local_bytes=kernel.local_bytes,
            parameters=pack(kernel, given, self.memory),
        )
        self.ctas = size[0] * size[1] * size[2]
        self.random = np.random.default_rng(options.seed)
        self.statistics = Statistics(self.ctas)
        self.clock = Clock(self.ctas, warps) if options.races else None
        self.races_global = self._races("global", len(self.memory.bytes))

    def _races(self, space: str, size: int) -> Races | None:
        if self.clock is None:
            return None
        assert self.options.races is not None
        instructions = self.program.kernel.instructions
        return Races(space, size, self.program.cells[space], self.clock, self.options.races, instructions)

    def run(self) -> Statistics:
        together = max(1, self.options.threads // (self.grid.warps * LANES))
        ctas = np.arange(self.ctas)
        if self.options.ctas == "random":
            self.random.shuffle(ctas)
        for first in range(0, self.ctas, together):
            self._batch(ctas[first : first + together])
        self.memory.give_back()
        return self.statistics

    def _batch(self, ctas: Array) -> None:
        batch = Batch(self.grid, ctas, self.options)
        races = None
        if self.races_global is not None:
            shared = self._races("shared", len(batch.shared.bytes))
            assert shared is not None
            races = (shared, self.races_global)
        warps = range(self.grid.warps)
        lockstep = self.options.order == "lockstep"
        groups = [list(warps)] if lockstep else [[warp] for warp in warps]
        units = [Unit(self.program, Machine(batch, self.memory, group, races), lockstep) for group in groups]
        Schedule(units, Progress(self.options.limit, self.clock, self.statistics), self.random).run()
