"""Arithmetic against what the PTX manual says, lane by lane in plain Python and numpy."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from support.ptx import apply, bf16, bits, widen

RNG = np.random.default_rng(0)


EDGES32 = [0, 1, 2, 31, 32, 33, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFF0000, 0x12345678]
A32 = bits([a for a in EDGES32 for _ in EDGES32] + [0] * 28, np.uint32)
B32 = bits([b for _ in EDGES32 for b in EDGES32] + [1] * 28, np.uint32)


def signed(value: int, size: int = 32) -> int:
    return value - (1 << size) if value >> (size - 1) else value


TWO: list[tuple[str, Callable[[int, int], int]]] = [
    ("add.s32", lambda a, b: a + b),
    ("sub.s32", lambda a, b: a - b),
    ("mul.lo.s32", lambda a, b: a * b),
    ("mul.hi.u32", lambda a, b: a * b >> 32),
    ("mul.hi.s32", lambda a, b: signed(a) * signed(b) >> 32),
    ("and.b32", lambda a, b: a & b),
    ("or.b32", lambda a, b: a | b),
    ("xor.b32", lambda a, b: a ^ b),
    ("shl.b32", lambda a, b: a << b if b < 32 else 0),
    ("shr.u32", lambda a, b: a >> b if b < 32 else 0),
    ("shr.s32", lambda a, b: signed(a) >> min(b, 31)),
    ("min.s32", lambda a, b: min(signed(a), signed(b))),
    ("max.u32", lambda a, b: max(a, b)),
    ("div.u32", lambda a, b: a // b if b else 0xFFFFFFFF),
    ("div.s32", lambda a, b: int(Fraction(signed(a), signed(b))) if b else 0xFFFFFFFF),
    ("rem.u32", lambda a, b: a % b if b else a),
    ("rem.s32", lambda a, b: signed(a) - int(Fraction(signed(a), signed(b))) * signed(b) if b else a),
]


@pytest.mark.parametrize(("code", "expected"), TWO, ids=[code for code, _ in TWO])
def test_integers_of_32_bits(code: str, expected: Callable[[int, int], int]) -> None:
    found = apply(f"{code} {{d}}, {{a}}, {{b}};", [A32, B32], np.uint32)
    assert [int(x) for x in found] == [expected(int(a), int(b)) & 0xFFFFFFFF for a, b in zip(A32, B32, strict=True)]


@pytest.mark.parametrize("kind", ["u64", "s64"])
def test_wide_products(kind: str) -> None:
    a, b = (RNG.integers(0, 2**64, 64, np.uint64) for _ in range(2))
    a[:4] = b[2:6] = (0, 1, 2**63, 2**64 - 1)
    read = signed if kind == "s64" else lambda value, size: value
    products = [read(int(x), 64) * read(int(y), 64) for x, y in zip(a, b, strict=True)]
    high = apply(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", [a, b], np.uint64)
    low = apply(f"mul.lo.{kind} {{d}}, {{a}}, {{b}};", [a, b], np.uint64)
    assert [int(x) for x in high] == [product >> 64 & 2**64 - 1 for product in products]
    assert [int(x) for x in low] == [product & 2**64 - 1 for product in products]
    c = RNG.integers(0, 2**64, len(A32), np.uint64)
    short = kind[0] + "32"
    of = signed if kind == "s64" else lambda value: value
    wide = apply(f"mad.wide.{short} {{d}}, {{a}}, {{b}}, {{c}};", [A32, B32, c], np.uint64)
    expected = [of(int(x)) * of(int(y)) + int(z) & 2**64 - 1 for x, y, z in zip(A32, B32, c, strict=True)]
    assert [int(x) for x in wide] == expected


def test_fma_rounds_once() -> None:
    a, b, c = (RNG.standard_normal(1024).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2]  # what is left is the error of the product
    a[1], b[1], c[1] = 1 + 2.0**-23, 1 + 2.0**-12, 2.0**-60
    a[3], b[3], c[3] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80  # the product is halfway between two fp32
    found = apply("fma.rn.f32 {d}, {a}, {b}, {c};", [a, b, c], np.float32)
    for x, y, z, got in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        one, other = (np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf))
        assert all(abs(Fraction(float(got)) - exact) <= abs(Fraction(float(near)) - exact) for near in (one, other))


def test_functions_of_floats() -> None:
    a, b = (np.abs(RNG.standard_normal(256)).astype(np.float32) + np.float32(0.1) for _ in range(2))
    wide = a.astype(np.float64), b.astype(np.float64)
    expected = {
        "div.full.f32 {d}, {a}, {b};": wide[0] / wide[1],
        "rsqrt.approx.ftz.f32 {d}, {a};": wide[0] ** -0.5,
        "ex2.approx.f32 {d}, {a};": 2.0 ** wide[0],
        "lg2.approx.f32 {d}, {a};": np.log2(wide[0]),
        "rcp.approx.ftz.f32 {d}, {a};": 1 / wide[0],
        "sqrt.rn.f32 {d}, {a};": wide[0] ** 0.5,
        "tanh.approx.f32 {d}, {a};": np.tanh(wide[0]),
    }
    for code, want in expected.items():
        found = apply(code, [a, b] if "{b}" in code else [a], np.float32)
        assert np.abs(found / want - 1).max() < 1e-6, code
    nan = bits([np.nan, 1, -1, np.nan] * 8, np.float32)
    one = np.ones(32, np.float32)
    assert np.array_equal(apply("max.f32 {d}, {a}, {b};", [nan, one], np.float32), [1, 1, 1, 1] * 8)
    found = apply("max.NaN.f32 {d}, {a}, {b};", [nan, one], np.float32)
    assert np.array_equal(np.isnan(found), np.isnan(nan))
    tiny = bits([1e-40, -1e-40, 1e-30, 2.0] * 8, np.float32)
    assert list(apply("add.ftz.f32 {d}, {a}, {b};", [tiny, tiny], np.float32)[:4]) == [0.0, 0.0, np.float32(2e-30), 4.0]
    assert list(apply("add.sat.f32 {d}, {a}, {a};", [tiny], np.float32)[2:4]) == [np.float32(2e-30), 1.0]


def test_pairs_of_halves() -> None:
    a, b = (bf16(RNG.standard_normal(128)).reshape(64, 2) for _ in range(2))
    packed = [x.view(np.uint32).reshape(-1) for x in (a, b)]
    for name, function in {"mul": np.multiply, "add": np.add}.items():
        found = apply(f"{name}.rn.bf16x2 {{d}}, {{a}}, {{b}};", packed, np.uint32)
        assert np.array_equal(found.view(np.uint16).reshape(64, 2), bf16(function(widen(a), widen(b)))), name
    h, k = (RNG.standard_normal((64, 2)).astype(np.float16) for _ in range(2))
    packed = [x.view(np.uint32).reshape(-1) for x in (h, k)]
    found = apply("mul.f16x2 {d}, {a}, {b};", packed, np.uint32)
    assert np.array_equal(found.view(np.float16).reshape(64, 2), h * k)
