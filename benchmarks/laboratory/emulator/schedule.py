"""The order in which the units of a batch go on, and the barriers at which they wait for each other."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from laboratory.emulator.errors import Hang
from laboratory.emulator.unit import Progress, Unit


@dataclass(frozen=True)
class Schedule:
    """Units of the same CTAs: whichever can go on is run next, at random where several can."""

    units: list[Unit]
    progress: Progress
    random: np.random.Generator

    def run(self) -> None:
        """Run until all have ended.

        Raises:
            Hang: they wait for each other forever, or loops do not end.
        """
        while True:
            runnable = [unit for unit in self.units if unit.ready]
            if runnable:
                which = self.random.integers(len(runnable)) if len(runnable) > 1 else 0
                runnable[which].go(self.progress)
            elif any(unit.waiting for unit in self.units):
                self._release()
            else:
                return

    def _release(self) -> None:
        """Let those CTAs go on whose threads are all at their barrier."""
        alive = sum(np.count_nonzero(unit.alive.reshape(unit.threads.shape), axis=1) for unit in self.units)
        at_barrier: dict[tuple[int, int | None], Any] = {}
        for unit in self.units:
            for (_, barrier), mask in unit.waiting.items():
                count = np.count_nonzero(mask.reshape(unit.threads.shape), axis=1)
                at_barrier[barrier] = at_barrier.get(barrier, 0) + count
        released = False
        for barrier, count in at_barrier.items():
            wanted = alive if barrier[1] is None else barrier[1]
            which = (count >= wanted) & (count > 0)
            if np.count_nonzero(which):
                released = True
                self.progress.passed(self.units[0].threads.batch.ctas[which])
                for unit in self.units:
                    unit.release(barrier, which)
        if not released:
            raise Hang(self._stuck())

    def _stuck(self) -> str:
        lines = ["threads wait at barriers that others of their CTA never reach:"]
        for unit in self.units:
            for (block, _), mask in unit.waiting.items():
                first = unit.threads.name(int(np.argmax(mask)))
                last = unit.program.kernel.blocks[block - 1].instructions[-1]
                lines.append(f"{np.count_nonzero(mask)} threads from {first} on at {last}")
        return "\n".join(lines)
