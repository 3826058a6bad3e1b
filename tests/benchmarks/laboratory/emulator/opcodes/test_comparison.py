"""Comparisons against what the PTX manual says, lane by lane in plain Python and numpy."""

import numpy as np
import pytest

from support.ptx import apply, bf16, bits, widen

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


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_comparisons_of_pairs(kind: str) -> None:
    """The lower halves give the first predicate, the upper ones the second."""
    values = np.random.default_rng(0).standard_normal((2, 64, 2)).astype(np.float32)
    values[0, :8] = np.nan
    values[1, 4:16] = values[0, 4:16]
    halves = values.astype(np.float16).view(np.uint16) if kind == "f16x2" else bf16(values)
    rounded = halves.view(np.float16) if kind == "f16x2" else widen(halves)
    a, b = (np.ascontiguousarray(x).view(np.uint32).reshape(-1) for x in halves)
    for name, compare in {"lt": np.less, "eq": np.equal, "ge": np.greater_equal}.items():
        code = f"setp.{name}.{kind} %p1|%p2, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1; @%p2 add.s32 {{d}}, {{d}}, 2;"
        low, high = compare(*rounded).T
        assert np.array_equal(apply(code, [a, b], np.uint32), low + 2 * high), name
