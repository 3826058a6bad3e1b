"""Threads that go in lockstep, and the blocks that they take."""

from dataclasses import dataclass, field

import numpy as np

from laboratory.emulator.arith import Array
from laboratory.emulator.errors import Fault, Hang, PTXError
from laboratory.emulator.grid import Mask
from laboratory.emulator.machine import Machine
from laboratory.emulator.options import Statistics
from laboratory.emulator.races import Clock
from laboratory.emulator.syntax import Block
from laboratory.emulator.translate import Program

_POISON = {"b16": 0xFFFF, "b32": 0xFFFFFFFF, "b64": 0xFFFFFFFFFFFFFFFF, "p": 0}  # of registers nothing was written to


@dataclass
class Progress:
    """The state that all units of a batch share."""

    limit: int  # of blocks
    clock: Clock | None  # where races are watched
    statistics: Statistics
    blocks: int = 0

    def ran(self, block: Block) -> None:
        self.blocks += 1
        if self.blocks > self.limit:
            raise Hang(f"still running after {self.limit} blocks: {block.instructions[0]}")
        self.statistics.instructions += len(block.instructions)

    def passed(self, ctas: Array) -> None:
        """Note that CTAs of the grid have passed a barrier."""
        if self.clock is not None:
            self.clock.pass_barrier(ctas)


@dataclass
class Unit:
    """Threads that go in lockstep: groups of them, each at the beginning of a block.

    Of the groups the one that is furthest behind goes on, so that threads that took different ways meet again.
    """

    program: Program
    threads: Machine
    whole: bool  # it has all threads of its CTAs
    ready: dict[int, Mask] = field(default_factory=lambda: {0: None})
    waiting: dict[tuple[int, tuple[int, int | None]], Array] = field(default_factory=dict)  # by block and barrier

    def __post_init__(self) -> None:
        count = self.threads.count
        self.alive = np.ones(count, bool)
        self.registers = [
            self.threads.k["p" if register.kind == "p" else f"u{register.kind[1:]}"][_POISON[register.kind]]
            for register in self.program.kernel.registers
        ]

    def go(self, progress: Progress) -> None:
        """Run until all groups wait or have ended."""
        functions, jumps, blocks = self.program.blocks, self.program.jumps, self.program.kernel.blocks
        end = len(blocks)
        while self.ready:
            at = min(self.ready)
            mask = self.ready.pop(at)
            if at >= end:
                self._end(mask)
                continue
            progress.ran(blocks[at])
            try:
                condition = functions[at](self.registers, self.threads, mask)
            except Fault as fault:
                raise self._explained(fault) from None
            jump = jumps[at]
            if jump.kind == "next":
                self._join(at + 1, mask)
            elif jump.kind == "jump":
                self._join(end if jump.target is None else jump.target, mask)
            elif jump.kind == "branch":
                self._branch(end if jump.target is None else jump.target, at + 1, condition, mask)
            elif mask is None and self.whole and not self.waiting and jump.barrier[1] is None:
                progress.passed(self.threads.batch.ctas)
                self._join(at + 1, None)
            else:
                key = (at + 1, jump.barrier)
                here = np.ones(self.threads.count, bool) if mask is None else mask
                self.waiting[key] = self.waiting[key] | here if key in self.waiting else here

    def _join(self, block: int, mask: Mask) -> None:
        if block not in self.ready:
            self.ready[block] = mask
            return
        other = self.ready[block]
        assert mask is not None
        assert other is not None
        both = mask | other
        self.ready[block] = None if np.count_nonzero(both) == self.threads.count else both

    def _branch(self, target: int, following: int, condition: Array, mask: Mask) -> None:
        taken = condition if mask is None else condition & mask
        count = np.count_nonzero(taken)
        if count == 0:
            self._join(following, mask)
        elif count == (self.threads.count if mask is None else np.count_nonzero(mask)):
            self._join(target, mask)
        else:
            self._join(target, taken)
            self._join(following, ~taken if mask is None else mask & ~taken)

    def _end(self, mask: Mask) -> None:
        self.alive = np.zeros_like(self.alive) if mask is None else self.alive & ~mask

    def release(self, barrier: tuple[int, int | None], ctas: Array) -> None:
        """Threads of these CTAs that wait at a barrier go on."""
        going = np.repeat(ctas, self.threads.shape[1])
        for key in [key for key in self.waiting if key[1] == barrier]:
            mask = self.waiting.pop(key)
            if np.count_nonzero(stay := mask & ~going):
                self.waiting[key] = stay
            if count := np.count_nonzero(mask & going):
                self._join(key[0], None if count == self.threads.count else mask & going)

    def _explained(self, fault: Fault) -> PTXError:
        where = "" if fault.thread is None else f" ({self.threads.name(fault.thread)})"
        return fault.error(f"{self.program.kernel.instructions[fault.at]}\n{fault.message}{where}")
