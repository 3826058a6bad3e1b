"""Bytes that the kernels move between memory and cache, counted in the interpreter, against the table of their headers.

A kernel reads its tile a second time, and adds to sums that it has touched before: a small cache stands for the one
that such accesses hit on a GPU.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import reference
import torch
from triton.runtime import interpreter

from megatron_fc import FracConfig
from megatron_fc.kernels import launch

SECTOR = 32  # bytes that a GPU moves at once
# Half of a processor's share in the second-level cache of an H100, 50 MB for 132: for forward, of which a processor
# runs two programs, and for backward, since how much of the cache holds for one processor is not known.
CACHE = 50_000_000 // 264 // SECTOR
RATE, WIDTH = 4, 2048  # OLMoE-7B's; docs/kernels.md has other shapes
TILES = 4  # two for a program of the width connection's backward pass


class Cache:
    """Counts the bytes that a program moves, by address: least recently used sectors make room, written ones once."""

    def __init__(self) -> None:
        self.moved: Counter[int] = Counter()
        self._written: OrderedDict[int, bool] = OrderedDict()  # by sector that is in the cache

    def clear(self) -> None:
        self._written.clear()

    def touch(self, pointers: np.ndarray, mask: np.ndarray, writes: bool) -> None:
        for sector in np.unique(pointers[np.broadcast_to(mask, pointers.shape)] // SECTOR).tolist():
            written = self._written.pop(sector, None)
            if (written is None and not writes) or (writes and not written):
                self.moved[sector * SECTOR] += SECTOR
            self._written[sector] = writes or bool(written)
            if len(self._written) > CACHE:
                self._written.popitem(last=False)


@contextmanager
def counted() -> Iterator[Counter[int]]:
    """Bytes moved, by the address that they were moved from or to."""
    cache = Cache()
    builder = type(interpreter.interpreter_builder)
    load, store, begin = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

    def begin_program(self: object, *index: int) -> None:
        cache.clear()
        begin(self, *index)

    def counting_load(self: object, ptrs: object, mask: object, *rest: object) -> object:
        cache.touch(ptrs.data, mask.data, writes=False)  # type: ignore[attr-defined]
        return load(self, ptrs, mask, *rest)

    def counting_store(self: object, ptrs: object, value: object, mask: object, *rest: object) -> object:
        cache.touch(ptrs.data, mask.data, writes=True)  # type: ignore[attr-defined]
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    builder.set_grid_idx = begin_program
    try:
        yield cache.moved
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx = load, store, begin


def of(moved: Counter[int], *tensors: torch.Tensor | None) -> int:
    """Bytes moved from or to the storages of these tensors."""
    total = 0
    for tensor in tensors:
        assert tensor is not None
        start = tensor.data_ptr()
        total += sum(n for address, n in moved.items() if start <= address < start + tensor.nbytes)
    return total


def rows(moved: Counter[int], *tensors: torch.Tensor | None) -> float:
    """Bytes moved, in rows: the size of a stream."""
    assert tensors[0] is not None
    return of(moved, *tensors) / tensors[0].nbytes


@pytest.fixture
def case() -> reference.Case:
    return reference.make(FracConfig(rate=RATE), WIDTH, TILES * 16 // RATE, torch.bfloat16, "rmsnorm")


def coefficient_bytes(case: reference.Case) -> tuple[int, int]:
    """Of beta or its gradient, and of alpha, in fp32."""
    return len(case.h) * 4 * case.config.rate, len(case.h) * 4 * case.config.rate**2


def test_width(case: reference.Case) -> None:
    site, (beta_bytes, alpha_bytes) = (case.p, case.config, case.norm), coefficient_bytes(case)
    with counted() as moved:
        x, beta, alpha = launch.width_forward(case.h, *site)
    assert rows(moved, case.h, x) == 2
    assert of(moved, beta, alpha) == beta_bytes + alpha_bytes
    with counted() as moved:
        back = launch.width_backward(case.g_x, case.g_beta, case.g_mixed, case.h, *site)
    assert rows(moved, case.g_x, case.g_mixed, case.h, back.h) == 4
    assert of(moved, case.g_beta) == beta_bytes
    rest = moved.total() - of(moved, case.g_x, case.g_mixed, case.h, back.h, case.g_beta)
    # Parameters are read once per program and sums written once per program, neither once per tile.
    c, k = WIDTH // RATE, 2 * RATE + 1
    small = 4096 + 16 * 4 * 32  # static parameters and tables of coefficients
    programs = launch.programs(TILES * 16, case.h.device, per_processor=1)
    assert rest <= programs * (2 * 4 * k * c + 4 * c + 6 * WIDTH + small)


def test_depth(case: reference.Case) -> None:
    config, (beta_bytes, alpha_bytes) = case.config, coefficient_bytes(case)
    before = launch.Before(case.o, case.h, *case.coefficients)
    with counted() as moved:
        out = launch.depth_forward(before, config)
    assert rows(moved, case.o, case.h, out) == 3
    assert of(moved, before.beta, before.alpha) == beta_bytes + alpha_bytes
    with counted() as moved:
        g_o, g_beta = launch.depth_backward(case.g_x, before, config)
    assert rows(moved, case.g_x, case.o, g_o) == 3
    assert of(moved, before.beta, g_beta) == 2 * beta_bytes


def test_boundary(case: reference.Case) -> None:
    site = (case.p, case.config, case.norm)
    before = launch.Before(case.o, case.h, *case.coefficients)
    with counted() as moved:
        h, x, _, _ = launch.boundary_forward(before, *site)
    assert rows(moved, case.o, case.h, h, x) == 4
    incoming = (None, case.g_x, case.g_beta, case.g_mixed)
    with counted() as moved:
        back, g_o, _ = launch.boundary_backward(*incoming, h, before, *site)
    assert rows(moved, case.g_x, case.g_mixed, h, case.o, back.h, g_o) == 6
