"""Matrices between registers and shared memory: ldmatrix and stmatrix."""

from collections.abc import Sequence

import numpy as np

from laboratory.emulator import fragments
from laboratory.emulator.access import Access
from laboratory.emulator.arith import U8, Array
from laboratory.emulator.grid import LANES, Mask


class Matrices(Access):
    """Threads that load and store matrices of 8 rows of 16 bytes."""

    def load_matrix(self, address: Array, offset: int, n: int, transposed: bool, mask: Mask, at: int) -> Array:
        """[n, threads]."""
        addressing = self._rows(n, mask)
        places = self.shared_places(address, offset, 16, addressing, at)
        items = self._load(self.batch.shared, 0, places, 16, 1, addressing, at)
        rows = np.ascontiguousarray(items.reshape(-1, LANES)[:, : 8 * n]).view(U8).reshape(-1, n, 8, 16)
        return fragments.from_rows(rows, transposed)

    def store_matrix(
        self, address: Array, offset: int, registers: Sequence[Array], transposed: bool, mask: Mask, at: int
    ) -> None:
        n = len(registers)
        addressing = self._rows(n, mask)
        places = self.shared_places(address, offset, 16, addressing, at)
        rows = np.zeros((self.count // LANES, LANES, 16), U8)
        rows[:, : 8 * n] = fragments.to_rows(registers, transposed).reshape(-1, 8 * n, 16)
        items = rows.reshape(-1).view(np.complex128)
        self._store(self.batch.shared, 0, places, 16, [items], addressing, at)

    def _rows(self, n: int, mask: Mask) -> Mask:
        """The lanes whose addresses count."""
        if n == 4:
            return mask
        used = self.lane < 8 * n
        return used if mask is None else used & mask
