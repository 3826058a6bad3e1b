"""Moves of registers in parts, and registers that inline assembly declares."""

import numpy as np

from laboratory.emulator import run
from support.ptx import apply, kernel

RNG = np.random.default_rng(0)


def test_registers_in_parts() -> None:
    a, b = (RNG.integers(0, 2**32, 32, np.uint32) for _ in range(2))
    code = "mov.b32 {{%rs1, %rs2}}, {a}; mov.b32 {{%rs3, %rs4}}, {b}; mov.b32 {d}, {{%rs2, %rs3}};"
    assert np.array_equal(apply(code, [a, b], np.uint32), a >> 16 | b << 16)
    found = apply("mov.b64 {d}, {{{a}, {b}}};", [a, b], np.uint64)
    assert np.array_equal(found, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))
    found = apply("mov.b64 {{%r90, {d}}}, {a};", [found], np.uint32)
    assert np.array_equal(found, b)
    # A copy keeps its value when what it was copied from changes.
    code = "mov.b32 {d}, {a}; add.s32 {a}, {a}, 1; xor.b32 {d}, {d}, {a};"
    assert np.array_equal(apply(code, [a], np.uint32), a ^ (a + np.uint32(1)))


def test_scopes_of_inline_assembly() -> None:
    body = """
    {
        .reg .pred p; .reg .b32 t<2>;
        setp.lt.u32 p, %r0, 5; // a comment; with a semicolon
        mov.b32 t0, 1; mov.b32 t1, 2;
        selp.b32 %r5, t0, t1, p;
    }
    { .reg .b32 t<2>; mov.b32 t0, 10; add.s32 %r5, %r5, t0; }
    mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r5;
    """
    out = np.zeros(32, np.uint32)
    run(kernel(body, 1), (1,), 1, [out])
    assert list(out) == [11] * 5 + [12] * 27
