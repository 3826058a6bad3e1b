"""A compiled kernel as the simulator runs it: the instructions of a program in order, and where each access goes."""

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from laboratory.simulator import core, origins, sass
from laboratory.simulator.assumptions import (
    PROGRAMS,
    REGISTERS,
    RESERVED_BYTES,
    SHARED_BYTES,
    THREADS,
    Assumptions,
    use_of,
)
from laboratory.simulator.core import Event, Result
from laboratory.simulator.sass import Instruction, Loop
from megatron_fc.errors import UserError


@dataclass(frozen=True)
class Stream:
    """Rows in DRAM. A tile's bytes come from there once; later reads, and reads of what was written, from L2.

    Of the lanes of an access this share moves bytes of its own: others are masked, or read what a neighbour reads.
    """

    tile_bytes: float
    lanes: float = 1.0


class Token:
    """A few values per token, in DRAM."""


class Partial:
    """Sums that programs keep in memory of their own; they stay in L2."""


class Parameter:
    """Small, and read again and again: reads hit L1."""


Role = Stream | Token | Partial | Parameter
# Indices into the code, in the order in which a warp runs them.
Order = list[int]


class Kernel:
    """One binary, and what the caller knows of it.

    Attributes:
        code: all instructions; `prologue`, `body`, `epilogue`: indices into it as they run, the body once per tile.
        warps, registers, stack, shared: of a program, a thread (two), a program.

    Args:
        names: of the run-time parameters in order.
        role_of: what the pointer of this name points to.
        trips: rounds of every inner loop.
        persistent: the outermost loop goes over tiles; otherwise a program is one tile.
    """

    def __init__(
        self,
        cubin: bytes,
        ptx: str,
        names: Sequence[str],
        role_of: Callable[[str], Role],
        warps: int,
        shared: int,
        trips: int = 1,
        persistent: bool = True,
    ) -> None:
        self.code, labels = sass.parse(sass.disassemble(cubin))
        self.registers, self.stack = sass.usage(cubin)
        self.warps, self.shared, self.persistent = warps, shared, persistent
        pointers = origins.pointer_offsets(ptx, names)
        self._pointer = {k: origins.origin(self.code, k, pointers) for k, i in enumerate(self.code) if i.is_global}
        self._role = {name: role_of(name) for name in self._pointer.values()}
        self.prologue, self.body, self.epilogue = _paths(self.code, sass.loops(self.code, labels), trips, persistent)

    def simulate(
        self, assumed: Assumptions, tiles: int, programs: int | None = None, seed: int = 1, skew: int = 800
    ) -> Result:
        """Run `tiles` tiles on a whole GPU, `programs` per processor (default, and at most: as many as fit).

        Raises:
            UserError: not even one fits.
        """
        if not self.resident:
            raise UserError(
                f"no program fits on a processor: {self.warps} warps of {self.registers} registers per thread, "
                f"{self.shared} bytes of shared memory"
            )
        resident = min(self.resident, programs or PROGRAMS)
        launch = core.Launch(tiles, self.warps, resident, programs or resident, self.persistent, seed, skew)
        return core.run(self._segments(assumed), launch, assumed)

    @property
    def resident(self) -> int:
        """Programs that fit on a processor; 0 where one does not."""
        registers = math.ceil(self.registers / 8) * 8 * 32 * self.warps
        room = SHARED_BYTES // (self.shared + RESERVED_BYTES)
        return min(REGISTERS // registers, THREADS // (32 * self.warps), room, PROGRAMS)

    def count(self, base: str) -> int:
        """Instructions of this name that one warp runs in a tile."""
        return sum(self.code[k].base == base for k in self.body)

    def dram_bytes(self, assumed: Assumptions) -> float:
        """Of a tile."""
        return sum(e.moved for e in self._events(self.body, assumed) if "dram" in e.kind) * self.warps

    def issue_cycles(self) -> float:
        """Cycles of a processor's four schedulers that a tile takes."""
        return len(self.body) * self.warps / 4

    def shared_cycles(self, assumed: Assumptions) -> float:
        """Cycles that a tile takes shared memory, shuffles and asynchronous copies' writes included."""
        events = self._events(self.body, assumed)
        written = sum(e.moved / assumed.shared for e in events if e.kind.startswith("async"))
        return self.warps * (sum(e.shared for e in events) + written)

    def tensor_cycles(self, assumed: Assumptions) -> float:
        """Cycles of a processor's tensor cores that a tile takes."""
        return sum(e.cycles for e in self._events(self.body, assumed) if e.pipe == "tensor") * self.warps / 4

    def _segments(self, assumed: Assumptions) -> list[list[Event]]:
        return [self._events(path, assumed) for path in (self.prologue, self.body, self.epilogue)]

    def _events(self, path: Order, assumed: Assumptions) -> list[Event]:
        moved: dict[str, float] = collections.defaultdict(float)  # bytes of the tile by pointer so far
        written: set[str] = set()
        events = []
        for k in path:
            i = self.code[k]
            use = use_of(i.op, i.lane_bytes, assumed.hmma)
            kind, size = use.kind, 0.0
            if i.is_global:
                name = self._pointer[k]
                size = 32.0 * i.lane_bytes
                role = self._role[name]
                size *= role.lanes if isinstance(role, Stream) else 1.0
                kind, share = _destination(i, role, moved[name] * self.warps, name in written, assumed)
                moved[name] += 0 if i.is_global_store else size
                written |= {name} if i.is_global_store else set()
                size *= share
            elif kind == "wait group":
                size = _groups_left(i)
            assert kind is not None
            shared = use.shared * assumed.shared_scale
            events.append(Event(use.pipe, use.cycles, i.stall, i.wait, i.result, i.operands, kind, size, shared))
        return events


def _destination(i: Instruction, role: Role, read: float, written: bool, assumed: Assumptions) -> tuple[str, float]:
    """Where an access goes and the share of its lanes' bytes that moves; `read`: bytes of the tile that were read."""
    if i.is_global_store:
        in_dram = isinstance(role, Stream | Token)
        return "store dram" if in_dram else "store l2", assumed.token_share if isinstance(role, Token) else 1.0
    place, share = "l1", 1.0
    if isinstance(role, Token):
        place, share = "dram", assumed.token_share
    elif isinstance(role, Stream):
        place = "l2" if written or read >= role.tile_bytes else "dram"
    elif isinstance(role, Partial):
        place = "l2"
    if i.base == "LDGSTS":
        return "async dram" if place == "dram" else "async l2", share
    return place, share


def _groups_left(i: Instruction) -> int:
    """Groups of asynchronous copies that may still be under way behind a wait."""
    _, _, last = i.arguments.rpartition("0x")
    return int(last, 16) if ".LE" in i.op and last else 0


def _paths(
    code: Sequence[Instruction], loops: Sequence[Loop], trips: int, persistent: bool
) -> tuple[Order, Order, Order]:
    """Prologue, body and epilogue."""
    if not persistent:
        return [], _unrolled(0, len(code), loops, trips), []
    outer = max(loops, key=lambda loop: loop.back - loop.head)
    inner = [loop for loop in loops if outer.holds(loop)]
    body = _unrolled(outer.head, outer.back + 1, inner, trips)
    return list(range(outer.head)), body, list(range(outer.back + 1, len(code)))


def _unrolled(start: int, stop: int, loops: Sequence[Loop], trips: int) -> Order:
    """Indices from start to stop with these loops' rounds. Other branches are not taken: all code in between runs."""
    path: Order = []
    k = start
    while k < stop:
        loop = next((loop for loop in loops if loop.head == k), None)
        if loop is None:
            path.append(k)
            k += 1
        else:
            inner = [other for other in loops if loop.holds(other)]
            path += _unrolled(loop.head, loop.back + 1, inner, trips) * trips
            k = loop.back + 1
    return path
