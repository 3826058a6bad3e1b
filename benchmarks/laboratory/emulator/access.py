"""Loads and stores: which places addresses mean, whether they exist, and what is known of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from laboratory.emulator.arith import S64, U64, Array
from laboratory.emulator.errors import AccessError, Fault
from laboratory.emulator.grid import Mask
from laboratory.emulator.memory import GLOBAL, LOCAL_WINDOW, SHARED, SHARED_WINDOW, WINDOW, Space
from laboratory.emulator.threads import Threads


class Access(Threads):
    """Threads that read and write memory. Places are offsets into a space, of every thread."""

    def _fault(self, at: int, what: str, bad: Array, addresses: Array, where: Callable[[int], str]) -> None:
        thread = int(np.argmax(bad))
        address = int(addresses[thread])
        raise Fault(AccessError, at, f"{what} at address {address:#x}: {where(thread)}", thread)

    def _check(
        self, name: str, local: Array, limit: int, total: int, mask: Mask, at: int, address: Array, offset: int
    ) -> None:
        """Of accesses within a window of `limit` bytes per CTA or thread."""
        if np.maximum.reduce(local) <= limit - total and not np.count_nonzero(local & local.dtype.type(total - 1)):
            return
        active = np.ones(self.count, bool) if mask is None else mask
        full = address + address.dtype.type(offset & (1 << 8 * address.itemsize) - 1)
        bad = active & (local.astype(np.float64) > limit - total)
        if np.count_nonzero(bad):
            self._fault(at, f"{total} bytes", bad, full, lambda t: f"{name} memory has {limit} bytes")
        bad = active & (local & local.dtype.type(total - 1) != 0)
        self._fault(at, f"{total} bytes", bad, full, lambda t: f"{name} memory, not a multiple of {total}")

    def shared_places(self, address: Array, offset: int, total: int, mask: Mask, at: int) -> Array:
        kind = "u32" if address.itemsize == 4 else "u64"
        start = (offset - SHARED) & (0xFFFFFFFF if kind == "u32" else 0xFFFFFFFFFFFFFFFF)
        local = address + self.k[kind][start]
        if mask is not None:
            local = local * mask
        limit = self.grid.shared_bytes
        union = int(np.bitwise_or.reduce(local))  # no less than the largest
        if union > limit - total or union & (total - 1):
            self._check("shared", local, limit, total, mask, at, address, offset)
        return local.astype(np.intp) + self.shared_base

    def local_places(self, address: Array, offset: int, total: int, mask: Mask, at: int) -> Array:
        local = address.astype(U64) + U64(offset & 0xFFFFFFFFFFFFFFFF)
        if mask is not None:
            local = local * mask
        limit = self.grid.local_bytes
        union = int(np.bitwise_or.reduce(local))
        if union > limit - total or union & (total - 1):
            self._check("local", local, limit, total, mask, at, address, offset)
        return local.astype(np.intp) + self.local_base

    def global_places(self, address: Array, offset: int, total: int, mask: Mask, at: int) -> Array:
        places = (address + self.k["u64"][(offset - GLOBAL) & 0xFFFFFFFFFFFFFFFF]).view(S64)
        if mask is not None:
            places = np.where(mask, places, places[np.argmax(mask)])
        misaligned = np.bitwise_or.reduce(places) & (total - 1)
        low, high = int(np.minimum.reduce(places)), int(np.maximum.reduce(places))
        if misaligned or not self.memory.holds(low, high + total):
            bad = np.zeros(self.count, bool)
            bad[self.memory.outside(places, total)] = True
            if np.count_nonzero(bad):
                self._fault(at, f"{total} bytes", bad, places + GLOBAL, lambda t: self.memory.describe(int(places[t])))
            bad = places & (total - 1) != 0
            if np.count_nonzero(bad):
                self._fault(
                    at,
                    f"{total} bytes",
                    bad,
                    places + GLOBAL,
                    lambda t: f"not a multiple of {total}, {self.memory.describe(int(places[t]))}",
                )
        return places

    def _load(self, space: Space, watch: int, places: Array, size: int, count: int, mask: Mask, at: int) -> Array:
        bad = space.unknown(places, size * count, mask)
        if bad is not None:
            name = ("shared", "global", "local")[watch]
            raise Fault(AccessError, at, f"reads {name} memory that nothing was written to", int(bad[0]))
        if self.races is not None and watch < 2:
            self.races[watch].read(self, places, size * count, mask, at)
        return space.read(places, size, count)

    def _store(
        self, space: Space, watch: int, places: Array, size: int, values: Sequence[Array], mask: Mask, at: int
    ) -> None:
        total = size * len(values)
        races = None if self.races is None or watch == 2 else self.races[watch]
        before = None if races is None else races.before_write(space, places, total)
        if mask is None:
            space.write(places, size, values)
        else:
            space.write(places[mask], size, [value[mask] for value in values])
        if races is not None and before is not None:
            races.write(self, space, before, places, size, values, mask, at)

    def _none(self, size: int, count: int) -> Any:
        zero = self.k[f"u{8 * size}"][0]
        return zero if count == 1 else [zero] * count

    def load_shared(self, address: Array, offset: int, size: int, count: int, mask: Mask, at: int) -> Array:
        if mask is not None and not np.count_nonzero(mask):
            return self._none(size, count)
        places = self.shared_places(address, offset, size * count, mask, at)
        return self._load(self.batch.shared, 0, places, size, count, mask, at)

    def store_shared(
        self, address: Array, offset: int, size: int, values: Sequence[Array], mask: Mask, at: int
    ) -> None:
        if mask is None or np.count_nonzero(mask):
            places = self.shared_places(address, offset, size * len(values), mask, at)
            self._store(self.batch.shared, 0, places, size, values, mask, at)

    def load_global(self, address: Array, offset: int, size: int, count: int, mask: Mask, at: int) -> Array:
        if mask is not None and not np.count_nonzero(mask):
            return self._none(size, count)
        places = self.global_places(address, offset, size * count, mask, at)
        self.report(places, size * count, mask, writes=False)
        return self._load(self.memory, 1, places, size, count, mask, at)

    def store_global(
        self, address: Array, offset: int, size: int, values: Sequence[Array], mask: Mask, at: int
    ) -> None:
        if mask is None or np.count_nonzero(mask):
            places = self.global_places(address, offset, size * len(values), mask, at)
            bad = self.memory.read_only(places)
            if bad is not None:
                bad = bad if mask is None else bad & mask
                self._fault(
                    at, "writes", bad, places + GLOBAL, lambda t: f"read-only {self.memory.describe(places[t])}"
                )
            self.report(places, size * len(values), mask, writes=True)
            self._store(self.memory, 1, places, size, values, mask, at)

    def report(self, places: Array, size: int, mask: Mask, writes: bool) -> None:
        """Tell whoever counts the traffic of global memory."""
        if self.batch.traffic is not None:
            who = slice(None) if mask is None else mask
            self.batch.traffic(self.batch.ctas[self.cta[who]], self.memory.hosts(places[who]), size, writes)

    def load_local(self, address: Array, offset: int, size: int, count: int, mask: Mask, at: int) -> Array:
        places = self.local_places(address, offset, size * count, mask, at)
        return self._load(self.batch.local, 2, places, size, count, mask, at)

    def store_local(self, address: Array, offset: int, size: int, values: Sequence[Array], mask: Mask, at: int) -> None:
        places = self.local_places(address, offset, size * len(values), mask, at)
        self._store(self.batch.local, 2, places, size, values, mask, at)

    def _windows(self, address: Array, mask: Mask) -> list[tuple[str, Array, int]]:
        """Which threads' generic addresses are in which space, and where that begins."""
        active = np.ones(self.count, bool) if mask is None else mask
        shared = (address >= U64(SHARED_WINDOW)) & (address < U64(SHARED_WINDOW + WINDOW))
        local = (address >= U64(LOCAL_WINDOW)) & (address < U64(LOCAL_WINDOW + WINDOW))
        found = [("shared", active & shared, SHARED_WINDOW), ("local", active & local, LOCAL_WINDOW)]
        found.append(("global", active & ~shared & ~local, 0))
        return [item for item in found if np.count_nonzero(item[1])]

    def load_generic(self, address: Array, offset: int, size: int, count: int, mask: Mask, at: int) -> Any:
        parts = [
            (inside, getattr(self, f"load_{space}")(address, offset - start, size, count, self._all(inside), at))
            for space, inside, start in self._windows(address, mask)
        ]
        if not parts:
            return self._none(size, count)
        out = parts[0][1]
        for inside, value in parts[1:]:
            out = np.where(inside, value, out)
        return out

    def store_generic(
        self, address: Array, offset: int, size: int, values: Sequence[Array], mask: Mask, at: int
    ) -> None:
        for space, inside, start in self._windows(address, mask):
            getattr(self, f"store_{space}")(address, offset - start, size, values, self._all(inside), at)

    def _all(self, mask: Array) -> Mask:
        return None if np.count_nonzero(mask) == self.count else mask

    def parameter(self, offset: int, size: int) -> Array:
        return self.k[f"u{8 * size}"][int.from_bytes(self.grid.parameters[offset : offset + size], "little")]

    def symbol(self, name: str) -> Array:
        return self.k["u64"][self.memory.symbols[name]]
