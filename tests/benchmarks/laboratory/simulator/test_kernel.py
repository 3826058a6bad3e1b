"""Compiled kernels put together for the core: what runs per tile, where bytes go, what fits on a processor."""

from copy import copy
from dataclasses import replace
from functools import cache

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compiled import Shape
from laboratory.simulator.assumptions import H200, H200_LOW
from laboratory.simulator.kernel import Kernel, Parameter, Role, Stream
from launched import BYTES, launched
from megatron_fc.errors import UserError

WIDTH, WARPS = 2048, 4


@triton.jit
def scale(x, y, weight, count, W: tl.constexpr):
    w = tl.load(weight + tl.arange(0, W))
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        at = row * W + tl.arange(0, W)
        tl.store(y + at, tl.load(x + at) * w)


@cache
def scaled(tile_bytes: int = WIDTH * BYTES) -> Kernel:
    pointers = dict.fromkeys(("x", "y", "weight"), "*bf16")
    attributes = {(k,): [["tt.divisibility", 16]] for k in range(3)}
    source = ASTSource(scale, {**pointers, "count": "i32", "W": "constexpr"}, {(4,): WIDTH}, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    roles: dict[str, Role] = {"x": Stream(tile_bytes), "y": Stream(tile_bytes), "weight": Parameter()}
    names = ["x", "y", "weight", "count"]
    return Kernel(binary.asm["cubin"], binary.asm["ptx"], names, roles.__getitem__, WARPS, binary.metadata.shared)


def test_the_loop_over_tiles_is_the_body() -> None:
    kernel = scaled()
    assert (kernel.count("LDG"), kernel.count("STG"), kernel.count("BRA")) == (2, 2, 1)
    assert [kernel.code[k].base for k in kernel.prologue].count("LDG") == 2  # the weight
    assert kernel.code[kernel.epilogue[-1]].base == "EXIT"
    assert kernel.issue_cycles() == len(kernel.body) * WARPS / 4


def test_a_row_comes_from_dram_once_and_goes_there_once() -> None:
    assert scaled().dram_bytes(H200) == 2 * WIDTH * BYTES
    # Of a row of half the size the second load would be a repetition.
    assert scaled(WIDTH * BYTES // 2).dram_bytes(H200) == 1.5 * WIDTH * BYTES


def test_a_kernel_that_only_moves_reaches_the_copys_bandwidth() -> None:
    tiles = 1 << 16
    for assumed in (H200, H200_LOW):
        copy_us = tiles * 2 * WIDTH * BYTES / (assumed.copy_tbs * 1e6)
        assert copy_us / scaled().simulate(assumed, tiles, programs=16).us == pytest.approx(1, abs=0.04)


def test_one_program_per_processor_does_not_hide_the_latency() -> None:
    tiles = 1 << 13
    alone, many = (scaled().simulate(H200, tiles, programs).us for programs in (1, 16))
    assert alone > 1.4 * many


def test_what_fits_on_a_processor() -> None:
    kernel = scaled()
    assert kernel.resident == min(65536 // (-(-kernel.registers // 8) * 8 * 32 * WARPS), 16, 32)
    wide = copy(kernel)
    wide.shared = 228 * 1024
    with pytest.raises(UserError, match="no program fits on a processor"):
        wide.simulate(H200, 1)


@pytest.mark.parametrize(
    ("name", "m", "n", "rows"),
    [("width forward", 4, 4, 2), ("boundary forward", 4, 4, 4), ("boundary forward", 1, 4, 10)],
)
def test_the_projects_kernels_move_what_the_interpreter_counted(name: str, m: int, n: int, rows: int) -> None:
    """Their second pass reads from L2; values per token are a small part (docs/kernels.md)."""
    found = launched(Shape(name, 2048, m, n))
    moved = found.kernel.dram_bytes(H200) / found.tile_tokens / (2048 * BYTES)
    assert moved == pytest.approx(rows, rel=0.03)


def test_the_assumed_share_of_values_per_token_counts() -> None:
    found = launched(Shape("width forward", 2048, 4, 4))
    without = found.kernel.dram_bytes(replace(H200, token_share=0))
    assert without == found.tile_bytes
    assert found.kernel.dram_bytes(H200) > without
