"""Races: accesses to the same memory that nothing orders.

For each cell of memory: who wrote it last, who read it since, and when, by the barriers passed so far. A barrier of a
CTA orders what its threads do before it and after it, bar.warp.sync what the lanes of a warp do. Nothing orders CTAs.
A write of the value that is there already is no conflict: Triton has several threads write the same.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from laboratory.emulator.arith import U8, Array
from laboratory.emulator.errors import Fault, RaceError

if TYPE_CHECKING:
    from laboratory.emulator.grid import Mask
    from laboratory.emulator.memory import Space
    from laboratory.emulator.threads import Threads

_NOBODY = -1


class Clock:
    """How many barriers each CTA and each warp of a grid has passed."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.warps = warps
        self.of_cta = np.zeros(ctas, np.int32)
        self.of_warp = np.zeros(ctas * warps, np.int32)

    def pass_barrier(self, ctas: Array) -> None:
        self.of_cta[ctas] += 1
        self.of_warp.reshape(-1, self.warps)[ctas] += 1

    def pass_warp_barrier(self, warps: Array) -> None:
        self.of_warp[warps] += 1


class Races:
    """Watches one address space. Threads are numbered over the grid, 32 a warp."""

    def __init__(self, name: str, size: int, cell: int, clock: Clock, level: str, describe: Sequence[object]) -> None:
        self.name, self.cell, self.clock, self.describe = name, cell, clock, describe
        self.lanes, self.values = level in ("lanes", "values"), level == "values"
        cells = -(-size // cell)
        self.writer, self.reader = np.full((2, cells), _NOBODY, np.int32)
        self.written_at, self.write_cta, self.write_warp = np.zeros((3, cells), np.int32)
        self.read_at, self.read_cta, self.read_warp = np.zeros((3, cells), np.int32)
        self.many_ctas, self.many_warps, self.many_lanes = np.zeros((3, cells), bool)

    def _touched(self, threads: "Threads", places: Array, size: int, mask: "Mask") -> tuple[Array, Array, Array]:
        """Cells, the id of the thread for each, and its index among those that run; [accesses, cells of each]."""
        who = np.arange(threads.count) if mask is None else np.flatnonzero(mask)
        cells = (places[who] // self.cell)[:, None] + np.arange(size // self.cell)
        return cells, np.broadcast_to(threads.ids[who][:, None], cells.shape), who

    def _unordered(self, other: Array, ids: Array, cta_time: Array, warp_time: Array) -> Array:
        """Whether nothing came between what another thread did at these times and what this one does now."""
        per_cta = 32 * self.clock.warps
        same_cta, same_warp = other // per_cta == ids // per_cta, other // 32 == ids // 32
        recent = np.where(same_warp, warp_time == self.clock.of_warp[ids // 32], cta_time == self._now(ids))
        if not self.lanes:
            recent &= ~same_warp
        return (other != _NOBODY) & (other != ids) & (recent | ~same_cta)

    def _now(self, ids: Array) -> Array:
        return self.clock.of_cta[ids // (32 * self.clock.warps)]

    def _report(self, bad: Array, who: Array, others: Array, before: Array, doing: str, did: str, at: int) -> None:
        if np.count_nonzero(bad):
            access, cell = (int(i[0]) for i in np.nonzero(bad))
            other = int(others[access, cell])
            thread, per_cta = other % (32 * self.clock.warps), 32 * self.clock.warps
            name = f"warp {thread // 32}, lane {thread % 32} of CTA {other // per_cta}"
            what = f"{doing} {self.name} memory that {name} {did}, with no barrier between"
            raise Fault(RaceError, at, f"{what}: {self.describe[int(before[access, cell])]}", int(who[access]))

    def read(self, threads: "Threads", places: Array, size: int, mask: "Mask", at: int) -> None:
        cells, ids, who = self._touched(threads, places, size, mask)
        writer = self.writer[cells]
        bad = self._unordered(writer, ids, self.write_cta[cells], self.write_warp[cells])
        self._report(bad, who, writer, self.written_at[cells], "reads", "wrote", at)
        per_cta = 32 * self.clock.warps
        last = self.reader[cells]
        same_cta = (last != _NOBODY) & (last // per_cta == ids // per_cta)
        same_time = same_cta & (self.read_cta[cells] == self._now(ids))
        same_warp = last // 32 == ids // 32
        lately = same_time & same_warp & (self.read_warp[cells] == self.clock.of_warp[ids // 32])
        many_ctas = self.many_ctas[cells] | ((last != _NOBODY) & ~same_cta)
        many_warps = same_time & (self.many_warps[cells] | ~same_warp)
        many_lanes = lately & (self.many_lanes[cells] | (last != ids))
        self.reader[cells], self.read_at[cells] = ids, at
        self.read_cta[cells], self.read_warp[cells] = self._now(ids), self.clock.of_warp[ids // 32]
        self.many_ctas[cells], self.many_warps[cells], self.many_lanes[cells] = many_ctas, many_warps, many_lanes
        # Several threads of this instruction may have read the same.
        others = self.reader[cells]
        self.many_ctas[cells[others // per_cta != ids // per_cta]] = True
        self.many_warps[cells[others // 32 != ids // 32]] = True
        self.many_lanes[cells[others != ids]] = True

    def _last_of_warp(self, cells: Array, ids: Array) -> Array:
        """Of the writes of one warp to the same cell, the one that stays."""
        keys = (cells * np.int64(2**32) + ids // 32).reshape(-1)
        _, first = np.unique(keys[::-1], return_index=True)
        last = np.zeros(len(keys), bool)
        last[len(keys) - 1 - first] = True
        return last.reshape(cells.shape)

    def before_write(self, space: "Space", places: Array, size: int) -> Array:
        return space.bytes[places[:, None] + np.arange(size)]

    def write(
        self,
        threads: "Threads",
        space: "Space",
        before: Array,
        places: Array,
        size: int,
        values: Sequence[Array],
        mask: "Mask",
        at: int,
    ) -> None:
        total = size * len(values)
        cells, ids, who = self._touched(threads, places, total, mask)
        own = np.stack([value[who] for value in values], axis=1).view(U8).reshape(len(who), total)
        after = space.bytes[places[who][:, None] + np.arange(total)]

        def differs(other: Array) -> Array:
            return (own != other).reshape(*cells.shape, self.cell).any(axis=2)

        writer = self.writer[cells]
        lost = bad = differs(after)
        if not self.values:
            bad = lost & self._last_of_warp(cells, ids)
        if np.count_nonzero(bad):
            self.writer[cells[~lost]] = ids[~lost]
            self._report(
                bad, who, self.writer[cells], np.full(cells.shape, at), "writes to", "writes another value to", at
            )
        changed = differs(before[who])
        bad = changed & self._unordered(writer, ids, self.write_cta[cells], self.write_warp[cells])
        self._report(bad, who, writer, self.written_at[cells], "writes to", "wrote", at)
        reader = self.reader[cells]
        per_cta = 32 * self.clock.warps
        bad = self._unordered(reader, ids, self.read_cta[cells], self.read_warp[cells]) | (
            (reader // per_cta != ids // per_cta) & (reader != _NOBODY)
        )
        bad |= self.many_ctas[cells]
        bad |= (reader != _NOBODY) & self.many_warps[cells] & (self.read_cta[cells] == self._now(ids))
        if self.lanes:
            lately = self.read_warp[cells] == self.clock.of_warp[ids // 32]
            bad |= (reader != _NOBODY) & (reader // 32 == ids // 32) & self.many_lanes[cells] & lately
        self._report(bad & changed, who, reader, self.read_at[cells], "writes to", "read", at)
        self.writer[cells], self.written_at[cells], self.reader[cells] = ids, at, _NOBODY
        self.write_cta[cells], self.write_warp[cells] = self._now(ids), self.clock.of_warp[ids // 32]
        self.many_ctas[cells] = self.many_warps[cells] = self.many_lanes[cells] = False
