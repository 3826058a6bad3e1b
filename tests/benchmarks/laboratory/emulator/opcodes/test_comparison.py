"""Comparisons against what the PTX manual says, lane by lane in plain Python and numpy."""

import numpy as np

from support.ptx import apply, bits

EDGES32 = [0, 1, 2, 31, 32, 33, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFF0000, 0x12345678]
A32 = bits([a for a in EDGES32 for _ in EDGES32] + [0] * 28, np.uint32)
B32 = bits([b for _ in EDGES32 for b in EDGES32] + [1] * 28, np.uint32)


def test_comparisons() -> None:
    a = bits([1, 2, np.nan, 1, np.nan, -0.0, np.inf, 2] * 4, np.float32)
    b = bits([1, 1, 1, np.nan, np.nan, 0.0, 1, 3] * 4, np.float32)
    nan = np.isnan(a) | np.isnan(b)
    expected = {"eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "ge": a >= b, "ltu": (a < b) | nan}
    expected |= {"equ": (a == b) | nan, "neu": (a != b) | nan, "geu": (a >= b) | nan, "num": ~nan, "nan": nan}
    for name, want in expected.items():
        code = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
        assert np.array_equal(apply(code, [a, b], np.uint32), want), name
    code = "setp.lt.or.s32 %p1|%p2, {a}, {b}, %p3; selp.b32 {d}, 1, 2, %p1; @%p2 add.s32 {d}, {d}, 4;"
    found = apply("setp.ne.s32 %p3, {b}, {b}; " + code, [A32, B32], np.uint32)
    less = A32.view(np.int32) < B32.view(np.int32)
    assert np.array_equal(found, np.where(less, 1, 6))
