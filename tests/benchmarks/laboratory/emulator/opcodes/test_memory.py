"""Loads, stores, atomics and matrices in shared memory."""

import itertools

import numpy as np
import pytest

from laboratory.emulator import Options, run
from support.ptx import apply, kernel

RNG = np.random.default_rng(0)


def test_widths_of_accesses() -> None:
    source = RNG.integers(0, 256, 32 * 16).astype(np.uint8)
    for part, count in itertools.product((8, 16, 32, 64), (1, 2, 4)):
        if part * count > 128:
            continue
        out = np.zeros_like(source)
        kind = {8: "rs", 16: "rs", 32: "r", 64: "rd"}[part]
        names = [f"%{kind}{20 + n}" for n in range(count)]
        items, vector = ("{" + ", ".join(names) + "}", f".v{count}") if count > 1 else (names[0], "")
        step = part * count // 8
        body = f"""
        mad.wide.u32 %rd8, %r0, {step}, %rd0; mad.wide.u32 %rd9, %r0, {step}, %rd1;
        mov.b32 %r6, global_smem; mad.lo.s32 %r7, %r0, {step}, %r6;
        ld.global.L1::evict_last{vector}.b{part} {items}, [%rd8];
        st.shared{vector}.b{part} [%r7+16], {items};
        {"".join(f"mov.b{max(part, 16)} {name}, 0;" for name in names)}
        ld.shared{vector}.b{part} {items}, [%r7+16];
        st.global{vector}.b{part} [%rd9], {items};
        """
        run(kernel(body, 2), (1,), 1, [source, out], Options(shared=1024, uninitialised="error"))
        assert np.array_equal(out[: 32 * step], source[: 32 * step])
    signed_bytes = apply("ld.global.s8 {d}, [%rd40];", [source[:128].view(np.uint32)], np.int32)
    assert np.array_equal(signed_bytes, source[:128:4].view(np.int8))


def test_local_and_generic_memory() -> None:
    """A spill, and one function that is given global, shared and local addresses."""
    declarations = ".local .align 16 .b8 __local_depot0[32]; .shared .align 16 .b8 some[256];"
    body = """
    mov.b64 %rd20, __local_depot0; cvta.local.u64 %rd21, %rd20;
    st.local.b32 [%rd20+8], %r0; ld.b32 %r5, [%rd21+8];
    mad.wide.u32 %rd22, %r0, 4, %rd0; st.b32 [%rd22], %r5;
    mov.b32 %r6, some; mad.lo.s32 %r7, %r0, 4, %r6; cvt.u64.u32 %rd23, %r7; cvta.shared.u64 %rd24, %rd23;
    add.s32 %r8, %r5, 1000; st.b32 [%rd24], %r8; ld.shared.b32 %r9, [%r7];
    st.global.b32 [%rd22+256], %r9;
    setp.lt.u32 %p1, %r0, 8; selp.b64 %rd25, %rd24, %rd22, %p1; ld.b32 %r10, [%rd25];
    st.global.b32 [%rd22+512], %r10;
    """
    out = np.zeros((3, 64), np.uint32)
    run(kernel(body, 1, declarations=declarations), (1,), 2, [out], Options(shared=0, uninitialised="error"))
    threads = np.arange(64)
    assert np.array_equal(out, [threads, threads + 1000, np.where(threads < 8, threads + 1000, threads)])


def test_atomics() -> None:
    total, floats_, old = np.zeros(2, np.uint32), np.zeros(1, np.float32), np.zeros(128, np.uint32)
    body = """
    atom.global.add.u32 %r5, [%rd0], 3; red.global.max.u32 [%rd0+4], %r0;
    atom.global.gpu.relaxed.add.f32 %r6, [%rd1], 0f3F000000;
    mov.u32 %r7, %ctaid.x; mad.lo.s32 %r8, %r7, 64, %r0; mad.wide.u32 %rd9, %r8, 4, %rd2; st.global.b32 [%rd9], %r5;
    """
    run(kernel(body, 3), (2,), 2, [total, floats_, old])
    assert list(total) == [3 * 128, 63]
    assert floats_[0] == 64
    assert sorted(old) == list(range(0, 3 * 128, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Rows of matrices lie anywhere in shared memory, at the addresses of lanes 8 i + r."""
    warps = 2
    order = RNG.permutation(warps * 32)  # of rows of 8 elements
    shared = RNG.integers(0, 2**16, (warps * 32, 8)).astype(np.uint16)
    addresses = (order * 16).astype(np.uint32)
    loaded = np.zeros((count, warps * 32), np.uint32)
    back = np.zeros((warps * 32, 8), np.uint16)
    registers = ", ".join(f"%r{10 + n}" for n in range(count))
    suffix = ".trans" if transposed else ""
    body = f"""
    mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.b32 %r5, [%rd9];
    mov.b32 %r6, global_smem; add.s32 %r5, %r5, %r6;
    mad.wide.u32 %rd10, %r0, 16, %rd1; ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd10];
    shl.b32 %r7, %r0, 4; add.s32 %r7, %r7, %r6; st.shared.v4.b32 [%r7], {{%r20, %r21, %r22, %r23}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{registers}}}, [%r5];
    mad.wide.u32 %rd11, %r0, 4, %rd2;
    {"".join(f"st.global.b32 [%rd11+{n * warps * 128}], %r{10 + n};" for n in range(count))}
    stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%r5+4096], {{{registers}}};
    bar.sync 0;
    setp.lt.u32 %p1, %r1, {8 * count};
    @%p1 ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r5+4096];
    mad.wide.u32 %rd12, %r0, 16, %rd3;
    @%p1 st.global.v4.b32 [%rd12], {{%r20, %r21, %r22, %r23}};
    """
    run(kernel(body, 4), (1,), warps, [addresses, shared, loaded, back], Options(shared=8192, races="lanes"))
    for warp, n, lane in itertools.product(range(warps), range(count), range(32)):
        matrix = np.array([shared[order[warp * 32 + 8 * n + r]] for r in range(8)])
        matrix = matrix.T if transposed else matrix
        low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
        assert loaded[n, warp * 32 + lane] == int(low) | int(high) << 16
    for warp, lane in itertools.product(range(warps), range(8 * count)):
        assert np.array_equal(back[warp * 32 + lane], shared[order[warp * 32 + lane]])
