"""Bit fields, bytes and shifts against what the PTX manual says, lane by lane in plain Python and numpy."""

import itertools

import numpy as np
import pytest

from support.ptx import apply, bits

RNG = np.random.default_rng(0)


def bfe(a: int, start: int, length: int, sign: bool) -> int:
    start, length = start & 255, length & 255
    fill = (a >> min(start + length - 1, 31) & 1) if sign and length else 0
    return sum(((a >> (start + i) & 1) if i < length and start + i <= 31 else fill) << i for i in range(32))


def prmt(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = source[choice & 7]
        out |= (0xFF if byte & 0x80 else 0) << 8 * i if choice & 8 else byte << 8 * i
    return out


@pytest.mark.parametrize("sign", [False, True])
def test_bit_fields(sign: bool) -> None:
    starts, lengths = (bits([0, 1, 4, 7, 31, 32, 40, 255], np.uint32) for _ in range(2))
    a = RNG.integers(0, 2**32, 64, np.uint32)
    start, length = (bits(x, np.uint32) for x in zip(*itertools.product(starts, lengths), strict=True))
    kind = "s32" if sign else "u32"
    found = apply(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, start, length], np.uint32)
    expected = [bfe(int(x), int(s), int(n), sign) for x, s, n in zip(a, start, length, strict=True)]
    assert list(found) == expected
    for s, n in [(0, 4), (4, 4), (3, 1), (31, 1), (0, 32)]:
        found = apply(f"bfe.{kind} {{d}}, {{a}}, {s}, {n};", [a], np.uint32)
        assert list(found) == [bfe(int(x), s, n, sign) for x in a]


def test_bytes_and_bits() -> None:
    a, b, c = (RNG.integers(0, 2**32, 64, np.uint32) for _ in range(3))
    c[:3] = 0x5410, 0x7632, 0xFEDC
    ints = [tuple(int(x) for x in row) for row in zip(a, b, c, strict=True)]
    assert list(apply("prmt.b32 {d}, {a}, {b}, {c};", [a, b, c], np.uint32)) == [prmt(*row) for row in ints]
    for selector in (0x5410, 0x7632, 0x3120, 0x8888):
        found = apply(f"prmt.b32 {{d}}, {{a}}, {{b}}, {selector};", [a, b], np.uint32)
        assert list(found) == [prmt(x, y, selector) for x, y, _ in ints]
    found = apply("lop3.b32 {d}, {a}, {b}, {c}, 0x96;", [a, b, c], np.uint32)
    assert list(found) == [x ^ y ^ z for x, y, z in ints]
    found = apply("shf.l.wrap.b32 {d}, {a}, {b}, {c};", [a, b, c], np.uint32)
    assert list(found) == [((y << 32 | x) << (z & 31)) >> 32 & 0xFFFFFFFF for x, y, z in ints]
    found = apply("shf.r.clamp.b32 {d}, {a}, {b}, {c};", [a, b, c % 40], np.uint32)
    assert list(found) == [(y << 32 | x) >> min(z % 40, 32) & 0xFFFFFFFF for x, y, z in ints]
    assert list(apply("popc.b32 {d}, {a};", [a], np.uint32)) == [x.bit_count() for x, _, _ in ints]
    assert list(apply("clz.b32 {d}, {a};", [a >> (b & 31)], np.uint32)) == [
        32 - (x >> (y & 31)).bit_length() for x, y, _ in ints
    ]
    assert list(apply("brev.b32 {d}, {a};", [a], np.uint32)) == [int(f"{x:032b}"[::-1], 2) for x, _, _ in ints]
    found = apply("bfi.b32 {d}, {a}, {b}, 5, 9;", [a, b], np.uint32)
    assert list(found) == [(y & ~(511 << 5)) | (x & 511) << 5 for x, y, _ in ints]
