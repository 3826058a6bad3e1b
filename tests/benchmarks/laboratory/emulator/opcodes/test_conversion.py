"""Conversions against what the PTX manual says, lane by lane in plain Python and numpy."""

import numpy as np

from support.ptx import apply, bf16, bits, widen

RNG = np.random.default_rng(0)


def floats(count: int) -> np.ndarray:
    """All kinds of magnitudes."""
    values = RNG.integers(0, 2**32, count, np.uint32).view(np.float32)
    values[:8] = 0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 1.0, 3.4e38
    return values


def test_conversions_between_floats() -> None:
    values = floats(1024)
    values[100:200] = widen(RNG.integers(0, 2**15, 100).astype(np.uint16)) * np.float32(1 + 2**-8)  # ties
    finite = np.isfinite(values) & (np.abs(values) < 3e38)
    found = apply("cvt.rn.bf16.f32 {d}, {a};", [values], np.uint16)
    assert np.array_equal(found[finite], bf16(values[finite]))
    assert widen(found[2:5])[0] == np.inf
    assert np.isnan(widen(found[4:5]))
    both = apply("cvt.rn.bf16x2.f32 {d}, {a}, {b};", [values, values[::-1].copy()], np.uint32)
    assert np.array_equal(both >> 16, found)
    assert np.array_equal(both & 0xFFFF, found[::-1])
    assert np.array_equal(apply("cvt.f32.bf16 {d}, {a};", [found], np.float32), widen(found), equal_nan=True)
    half = apply("cvt.rn.f16.f32 {d}, {a};", [values], np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(half, values.astype(np.float16), equal_nan=True)
    assert np.array_equal(apply("cvt.f32.f16 {d}, {a};", [half], np.float32), half.astype(np.float32), equal_nan=True)
    tf32 = apply("cvt.rna.tf32.f32 {d}, {a};", [values], np.float32)
    normal = finite & (np.abs(values) > 1e-37)
    exact = values[normal].astype(np.float64)
    unit = 2.0 ** (np.frexp(exact)[1] - 11)  # of eleven bits
    assert np.array_equal(tf32[normal], np.copysign(np.floor(np.abs(exact) / unit + 0.5) * unit, exact))
    assert np.array_equal(tf32[2:5], values[2:5], equal_nan=True)


def test_conversions_with_integers() -> None:
    values = bits([0.5, 1.5, -0.5, -2.7, 2.5, 1e10, -1e10, np.nan, np.inf, 2147483648.0] + [0.0] * 22, np.float32)
    expected = {
        "rni": [0, 2, 0, -3, 2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2**31 - 1],
        "rzi": [0, 1, 0, -2, 2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2**31 - 1],
        "rmi": [0, 1, -1, -3, 2, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2**31 - 1],
        "rpi": [1, 2, 0, -2, 3, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2**31 - 1],
    }
    for mode, want in expected.items():
        assert list(apply(f"cvt.{mode}.s32.f32 {{d}}, {{a}};", [values], np.int32)[:10]) == want
    assert list(apply("cvt.rzi.u32.f32 {d}, {a};", [values], np.uint32)[:6]) == [0, 1, 0, 0, 2, 2**32 - 1]
    whole = RNG.integers(-(2**31), 2**31, 64).astype(np.int32)
    assert np.array_equal(apply("cvt.rn.f32.s32 {d}, {a};", [whole], np.float32), whole.astype(np.float32))
    assert np.array_equal(apply("cvt.rn.f32.u32 {d}, {a};", [whole], np.float32), whole.view(np.uint32).astype("f4"))
    assert np.array_equal(apply("cvt.s64.s32 {d}, {a};", [whole], np.int64), whole)
    assert np.array_equal(apply("cvt.u64.u32 {d}, {a};", [whole], np.uint64), whole.view(np.uint32))
    assert np.array_equal(apply("cvt.u16.u32 {d}, {a};", [whole], np.uint16), whole.astype(np.uint16))
    assert np.array_equal(apply("cvt.s32.s8 {d}, {a};", [whole], np.int32), whole.astype(np.int8))
