# mypy: disable-error-code="no-untyped-def"
"""Triton and Gluon kernels of other kinds than the project's, run by the driver: copies to shared memory, atomics,
scans, 8-bit integers, layouts that are asked for.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from laboratory.emulator import Options, Unsupported
from laboratory.emulator.driver import Emulator, emulated
from megatron_fc.connections.kernels.availability import triton_obstacle

CHECKED = Options(races="lanes", uninitialised="error")
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(params=[80, 90])
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with emulated(request.param, CHECKED) as emulator:
        yield emulator


def random(*shape: int) -> Any:
    return torch.randn(*shape, generator=GENERATOR)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        at = k * BK + tl.arange(0, BK)
        left = tl.load(a + rows[:, None] * K + at[None, :], mask=(rows[:, None] < M) & (at[None, :] < K), other=0.0)
        right = tl.load(
            b + at[:, None] * N + columns[None, :], mask=(at[:, None] < K) & (columns[None, :] < N), other=0.0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty), mask=mask)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_pipelined_product(dtype: Any, stages: int) -> None:
    """On sm_80, where the loads of later steps are under way as cp.async."""
    a, b = random(40, 136).to(dtype), random(136, 48).to(dtype)
    c = torch.empty(40, 48, dtype=torch.float32)
    with emulated(80, CHECKED) as emulator:
        grid, sizes = (2, 2), {"BM": 32, "BN": 32, "BK": 32}
        seen = []
        emulator.edit = lambda name, text: seen.append(text) or text  # type: ignore[func-returns-value]
        matmul[grid](a, b, c, 40, 48, 136, **sizes, PRECISION="tf32x3", num_warps=4, num_stages=stages)
    assert ("cp.async.wait_group" in seen[0]) == (stages > 1)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=2e-5)


def test_wgmma_is_an_error() -> None:
    a, b, c = random(64, 64).half(), random(64, 64).half(), torch.empty(64, 64)
    with emulated(90) as _, pytest.raises(Unsupported, match="wgmma"):
        matmul[(1, 1)](a, b, c, 64, 64, 64, BM=64, BN=64, BK=64, PRECISION="tf32", num_warps=4, num_stages=1)


@triton.jit
def statistics(x, total, count, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < N, other=0.0)
    tl.atomic_add(total, tl.sum(values, axis=0))
    tl.atomic_add(count + tl.where(values > 0, 1, 0), tl.full([BLOCK], 1, tl.int32), mask=at < N)
    tl.store(out + at, tl.cumsum(values, axis=0) * tl.exp(-tl.max(values, axis=0)), mask=at < N)


def test_sums_scans_and_atomics(emulator: Emulator) -> None:
    emulator.options = Options(uninitialised="error")  # atomics order what the watch does not know of
    x = random(1000)
    total, count, out = torch.zeros(1), torch.zeros(2, dtype=torch.int32), torch.empty(1000)
    statistics[(4,)](x, total, count, out, 1000, BLOCK=256)
    torch.testing.assert_close(total, x.sum(0, keepdim=True))
    assert count.tolist() == [int((x <= 0).sum()), int((x > 0).sum())]
    parts = [
        part.cumsum(0) * torch.exp(-torch.cat([part, torch.zeros(256 - len(part))]).max()) for part in x.split(256)
    ]
    torch.testing.assert_close(out, torch.cat(parts))


@triton.jit
def quantise(x, out, back, N: tl.constexpr):
    """Rows to 8-bit integers and back, with integer divisions."""
    row, at = tl.program_id(0), tl.arange(0, N)
    values = tl.load(x + row * N + at).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(values), axis=0) / 127, 1e-10)
    whole = tl.floor(values / step + 0.5).to(tl.int8)
    tl.store(out + row * N + at, whole)
    tl.store(back + row * N + (at % 7) * (N // 7 + 1) % N, (whole.to(tl.int32) // 3).to(tl.int16), mask=at < 7)


def test_small_integers(emulator: Emulator) -> None:
    x = random(3, 128).bfloat16()
    out, back = torch.zeros(3, 128, dtype=torch.int8), torch.zeros(3, 128, dtype=torch.int16)
    quantise[(3,)](x, out, back, N=128, num_warps=2)
    step = x.float().abs().amax(1, keepdim=True) / 127
    expected = torch.floor(x.float() / step + 0.5).to(torch.int8)
    assert torch.equal(out, expected)
    divided = torch.div(expected[:, :7].int(), 3, rounding_mode="trunc").short()
    assert torch.equal(back[:, (torch.arange(7) * 19) % 128], divided)


@triton.jit
def doubled(x, out, N, ROW, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + tl.program_id(0) * ROW + at, mask=at < N, other=0.0), mask=at < N)


def test_tensors_that_are_not_contiguous(emulator: Emulator) -> None:
    whole, out = random(8, 40), torch.zeros(9)
    doubled[(1,)](whole[2:, 5:14], out, 9, 40, BLOCK=16, num_warps=1)
    assert torch.equal(out, 2 * whole[2, 5:14])
    out.untyped_storage().resize_(0)  # as Megatron frees what it computes again


@gluon.jit
def copied_product(a, b, c, K: gl.constexpr, WAIT: gl.constexpr):
    """A product of 32 rows and columns by mma.sync from swizzled shared memory that cp.async fills, K in two steps."""
    HALF: gl.constexpr = K // 2
    product: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    a_shared = gl.allocate_shared_memory(a.dtype.element_ty, [2, 32, HALF], swizzled)
    b_shared = gl.allocate_shared_memory(b.dtype.element_ty, [2, HALF, 32], swizzled)
    rows = gl.arange(0, 32, gl.SliceLayout(1, loads))
    inner = gl.arange(0, HALF, gl.SliceLayout(1, loads))
    across = gl.arange(0, HALF, gl.SliceLayout(0, loads))
    columns = gl.arange(0, 32, gl.SliceLayout(0, loads))
    for step in gl.static_range(2):
        from_a = a + rows[:, None] * K + step * HALF + across[None, :]
        from_b = b + (step * HALF + inner)[:, None] * 32 + columns[None, :]
        async_copy.async_copy_global_to_shared(a_shared.index(step), from_a)
        async_copy.async_copy_global_to_shared(b_shared.index(step), from_b)
        async_copy.commit_group()
    total = gl.zeros([32, 32], gl.float32, product)
    for step in gl.static_range(2):
        async_copy.wait_group(WAIT - step)
        gl.thread_barrier()
        total = mma_v2(a_shared.index(step).load(left), b_shared.index(step).load(right), total)
    out_rows = gl.arange(0, 32, gl.SliceLayout(1, product))
    out_columns = gl.arange(0, 32, gl.SliceLayout(0, product))
    gl.store(c + out_rows[:, None] * 32 + out_columns[None, :], total)


def test_a_gluon_kernel(emulator: Emulator) -> None:
    a, b, c = random(32, 64).bfloat16(), random(64, 32).bfloat16(), torch.empty(32, 32)
    copied_product[(1,)](a, b, c, K=64, WAIT=1, num_warps=4)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=2e-5)


def test_a_wait_that_is_too_short_is_noticed(emulator: Emulator) -> None:
    a, b, c = random(32, 64).bfloat16(), random(64, 32).bfloat16(), torch.empty(32, 32)
    emulator.options = Options()
    copied_product[(1,)](a, b, c, K=64, WAIT=2, num_warps=4)
    assert c.isnan().all()


def test_only_inside_kernels_take_cpu_tensors() -> None:
    assert "tensors are on cpu" in str(triton_obstacle("cpu"))
    with emulated():
        assert triton_obstacle("cpu") is None
    assert "tensors are on cpu" in str(triton_obstacle("cpu"))
    with pytest.raises(RuntimeError, match="active drivers"):
        doubled[(1,)](torch.zeros(16), torch.zeros(16), 9, 40, BLOCK=16, num_warps=1)


def test_edited_text_runs_in_place_of_the_compilers(emulator: Emulator) -> None:
    x, out = torch.ones(16), torch.zeros(16)
    emulator.edit = lambda name, text: text.replace("add.f32", "sub.f32").replace("add.rn.f32", "sub.rn.f32")
    doubled[(1,)](x, out, 16, 16, BLOCK=16, num_warps=1)
    assert not out.any()
    assert [name for name, _ in emulator.launches] == ["doubled"]


def test_traffic_is_told_by_the_callers_addresses(emulator: Emulator) -> None:
    seen: list[Any] = []
    emulator.options = Options(traffic=lambda *access: seen.append(access))
    x, out = torch.ones(2, 16), torch.zeros(16)
    doubled[(1,)](x[1:], out, 16, 16, BLOCK=16, num_warps=1)
    for tensor, writes in ((x[1], False), (out, True)):
        [(ctas, addresses, size)] = [(c, a, s) for c, a, s, w in seen if w == writes]
        reached = {int(address) + byte for address in addresses for byte in range(size)}
        assert reached == set(range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
        assert not ctas.any()
