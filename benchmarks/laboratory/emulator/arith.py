"""Arithmetic on bits: formats that numpy lacks, and operations whose rounding or corner cases differ from numpy's."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S8, S16, S32, S64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
Array = NDArray[Any]

KINDS: dict[str, Any] = {"u8": U8, "u16": U16, "u32": U32, "u64": U64, "s8": S8, "s16": S16, "s32": S32, "s64": S64}
KINDS |= {"f16": F16, "f32": F32, "f64": F64}


# bf16, as the upper half of an fp32.


def widen(bits: Array) -> Array:
    """bf16 [uint16] -> the same values in fp32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def round_bf16(values: Array) -> Array:
    """fp32 -> nearest bf16, ties to even, NaN to the canonical one: the bits in uint32."""
    bits = values.view(U32)
    rounded = (bits + (U32(0x7FFF) + ((bits >> U32(16)) & U32(1)))) >> U32(16)
    nan = np.isnan(values)
    return np.where(nan, U32(0x7FFF), rounded) if np.count_nonzero(nan) else rounded


def round_bf16_zero(values: Array) -> Array:
    bits = values.view(U32)
    return np.where(np.isnan(values), U32(0x7FFF), bits >> U32(16))


def narrow(values: Array) -> Array:
    """fp32 -> nearest bf16 [uint16]."""
    return round_bf16(values).astype(U16)


def round_f16(values: Array) -> Array:
    """fp32 or fp64 -> nearest fp16: the bits in uint32, NaN the canonical one."""
    bits = values.astype(F16).view(U16)
    nan = np.isnan(values)
    return (np.where(nan, U16(0x7FFF), bits) if np.count_nonzero(nan) else bits).astype(U32)


def round_tf32(values: Array) -> Array:
    """fp32 -> nearest TF32, ties away from zero (cvt.rna)."""
    bits = values.view(U32)
    rounded = (bits + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).view(F32)


def toward_zero(exact: Array) -> Array:
    """fp64 -> fp32, rounded toward zero."""
    nearest = exact.astype(F32)
    return np.where(np.abs(nearest.astype(F64)) > np.abs(exact), np.nextafter(nearest, F32(0)), nearest)


# fp32.


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c of fp32, rounded once."""
    product, c = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + c
    # The product is exact. Halfway between two fp32, what the sum in fp64 lost decides to which side it goes.
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if np.count_nonzero(tie):
        part = total - product
        lost = (product - (total - part)) + (c - part)
        away = np.where(lost > 0, np.inf, -np.inf)
        total = np.where(tie & (lost != 0) & np.isfinite(total), np.nextafter(total, away), total)
    return total.astype(F32)


def flush(values: Array) -> Array:
    """Subnormal fp32 to zero of the same sign (.ftz)."""
    return np.where(np.abs(values) < F32(1.1754943508222875e-38), np.copysign(F32(0), values), values)


def saturate(values: Array) -> Array:
    """Into [0, 1], NaN to 0 (.sat)."""
    return np.clip(np.nan_to_num(values, nan=0.0), 0, 1).astype(values.dtype)


def rsqrt(values: Array) -> Array:
    return (1.0 / np.sqrt(values.astype(F64))).astype(F32)


def through_f64(function: Any) -> Any:
    """An approximation of the hardware in fp32, here the nearest fp32 of the value in fp64."""
    return lambda values: function(values.astype(F64)).astype(F32)


# Pairs of 16-bit floats in 32 bits.


def halves_bf16(pairs: Array) -> tuple[Array, Array]:
    """[uint32] -> the lower and the upper half in fp32."""
    return (pairs << U32(16)).view(F32), (pairs & U32(0xFFFF0000)).view(F32)


def halves_f16(pairs: Array) -> tuple[Array, Array]:
    """[uint32] -> the lower and the upper half in fp64."""
    low, high = np.ascontiguousarray(pairs).view(F16).reshape(-1, 2).T.astype(F64)
    return low, high


def packed_bf16(function: Callable[..., Any], *operands: Array) -> Array:
    """A function of fp32 on the two halves of registers."""
    parts = zip(*map(halves_bf16, operands), strict=True)
    low, high = (round_bf16(np.asarray(function(*values), F32)) for values in parts)
    return low | high << U32(16)


def packed_f16(function: Callable[..., Any], *operands: Array) -> Array:
    """A function of fp64 on the two halves of registers."""
    parts = zip(*map(halves_f16, operands), strict=True)
    low, high = (round_f16(np.asarray(function(*values), F64)) for values in parts)
    return low | high << U32(16)


# Integers.


def divide(a: Array, b: Array) -> Array:
    """Toward zero; all bits set for a division by zero."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, np.invert(np.zeros_like(a)), quotient)


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of 16, 32 or 64 bits, signed or not."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{bits // 4}").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    x, y, half, low = a.view(U64), b.view(U64), U64(32), U64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.view(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32: four bytes of {b, a}, each chosen by four bits; the highest spreads the byte's sign."""
    both = a.astype(U64) | (b.astype(U64) << U64(32))
    out = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> U32(4 * i)) & U32(15)
        byte = ((both >> ((choice & U32(7)) << U32(3)).astype(U64)) & U64(255)).astype(U32)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        out |= np.where(choice & U32(8), sign, byte) << U32(8 * i)
    return out


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """bfe of 32 or 64 bits, signed or not."""
    bits, kind = a.dtype.itemsize * 8, a.dtype.type
    start, length = start & U32(255), length & U32(255)
    inside = np.minimum(length, np.where(start < bits, bits - start, 0)).astype(np.int64)
    # Up to the top and down again; a signed field that goes over the top is filled with the sign.
    up = np.maximum(bits - start.astype(np.int64) - length.astype(np.int64), 0)
    down = np.minimum(up + start.astype(np.int64), bits)
    signed = a.dtype.kind == "i"
    field = (a << up.astype(kind)) >> np.minimum(down, bits - 1 if signed else bits).astype(kind)
    if not signed:
        return np.where(inside > 0, field, kind(0))
    return np.where(length == 0, kind(0), field)


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: the low bits of a into b."""
    kind = b.dtype.type
    start, length = (start & U32(255)).astype(kind), (length & U32(255)).astype(kind)
    mask = ((kind(1) << length) - kind(1)) << start
    return (b & ~mask) | ((a << start) & mask)


def funnel(low: Array, high: Array, count: Array, left: bool, clamp: bool) -> Array:
    """shf: the upper (left) or lower half of {high, low}, shifted."""
    both = low.astype(U64) | (high.astype(U64) << U64(32))
    n = (np.minimum(count, U32(32)) if clamp else count & U32(31)).astype(U64)
    return ((both << n) >> U64(32) if left else both >> n).astype(U32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits."""
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def leading_zeros(a: Array) -> Array:
    bits = a.dtype.itemsize * 8
    count = np.full(a.shape, bits, U32)
    for i in range(bits):
        count = np.where(a >> a.dtype.type(i) & a.dtype.type(1), U32(bits - 1 - i), count)
    return count


def reverse_bits(a: Array) -> Array:
    octets = np.unpackbits(a.view(U8).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(octets[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)


def to_integer(values: Array, rounding: str, kind: str) -> Array:
    """A float to an integer kind: values beyond its range become its ends, NaN zero."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](values.astype(F64))
    limits = np.iinfo(KINDS[kind])
    inside = np.where(np.isnan(whole), 0.0, np.clip(whole, float(limits.min), float(limits.max)))
    # The upper end of 64 bits is no float64: the nearest is one beyond.
    top = inside >= float(limits.max)
    out = np.where(top, 0.0, inside).astype(KINDS[kind])
    return np.where(top, KINDS[kind](limits.max), out)


def clamp_integer(values: Array, kind: str) -> Array:
    limits = np.iinfo(KINDS[kind])
    own = np.iinfo(values.dtype)
    return np.clip(values, max(limits.min, own.min), min(limits.max, own.max)).astype(KINDS[kind])
