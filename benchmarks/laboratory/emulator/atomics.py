"""Atomic operations: one thread after another."""

from collections.abc import Callable
from typing import Any

import numpy as np

from laboratory.emulator.access import Access
from laboratory.emulator.arith import F16, F32, KINDS, U8, U16, Array, narrow, widen
from laboratory.emulator.grid import Mask


class Atomics(Access):
    """Threads that change memory one after another."""

    def atomic(
        self, space: str, operation: str, kind: str, address: Array, offset: int, values: Any, mask: Mask, at: int
    ) -> Array:
        """One thread after another; what was there before, for each."""
        if space == "generic":
            parts = [
                (inside, self.atomic(name, operation, kind, address, offset - start, values, inside, at))
                for name, inside, start in self._windows(address, mask)
            ]
            out = parts[0][1] if parts else self._none(4, 1)
            for inside, value in parts[1:]:
                out = np.where(inside, value, out)
            return out
        size = {"f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2}.get(kind) or np.dtype(KINDS[kind]).itemsize
        if mask is not None and not np.count_nonzero(mask):
            return self._none(size, 1)
        places = getattr(self, f"{space}_places")(address, offset, size, mask, at)
        memory = self.batch.shared if space == "shared" else self.memory
        old = np.zeros(self.count, f"u{size}")
        update = _atomic(operation, kind)
        for thread in range(self.count) if mask is None else np.flatnonzero(mask):
            place = places[thread]
            cell = memory.bytes[place : place + size]
            before = cell.copy()
            old[thread] = before.view(old.dtype)[0]
            cell[:] = update(before, *(value[thread : thread + 1].view(U8) for value in values))
        return old


def _atomic(operation: str, kind: str) -> Callable[..., Array]:
    """On the bytes of one cell and of one thread's operands."""
    functions: dict[str, Callable[..., Any]] = {
        "add": np.add,
        "min": np.fmin if kind[0] == "f" else np.minimum,
        "max": np.fmax if kind[0] == "f" else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, new: new,
        "cas": lambda old, expected, new: np.where(old == expected, new, old),
        "inc": lambda old, limit: np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1)),
        "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1)),
    }
    function = functions[operation]
    if kind in ("bf16", "bf16x2"):
        return lambda *cells: narrow(function(*(widen(cell.view(U16)) for cell in cells))).view(U8)
    if kind in ("f16", "f16x2"):
        return lambda *cells: function(*(cell.view(F16).astype(F32) for cell in cells)).astype(F16).view(U8)
    return lambda *cells: function(*(cell.view(KINDS[kind]) for cell in cells)).view(U8)
