"""Warp-wide matrix instructions: which lane holds which element, and the products.

Registers are arrays [threads], warp after warp; lane l of a warp has group g = l // 4 and place t = l % 4. A register
of a and b holds e neighbouring elements along k: two of 16 bits or one of TF32. In the products d = a b + c of
m16n8k(8e), or of half that k without the second half h of a's and b's registers:

| | register | row | column |
|---|---|---|---|
| a | r + 2 h | g + 8 r | 4 e h + e t + 0..e-1 |
| b | h | 4 e h + e t + 0..e-1 | g |
| c and d | 2 r + p | g + 8 r | 2 t + p |

In ldmatrix and stmatrix, lane 8 i + r gives the address of row r of matrix i, 16 bytes. Register i of a lane holds
elements (g, 2t) and (g, 2t + 1) of matrix i, or with .trans (2t, g) and (2t + 1, g).
"""

from collections.abc import Sequence

import numpy as np

from laboratory.emulator.arith import F16, F32, F64, U16, U32, Array, halves_f16, toward_zero

# Of an element: how a register's 32 bits become values in fp64.
FORMATS = ("bf16", "f16", "tf32")


def _values(bits: Array, kind: str) -> Array:
    """[..., registers] in uint32, contiguous -> [..., elements] in fp64."""
    if kind == "f16":
        return bits.view(F16).astype(F64)
    if kind == "bf16":
        return (bits.view(U16).astype(U32) << U32(16)).view(F32).astype(F64)
    return (bits & U32(0xFFFFE000)).view(F32).astype(F64)  # tensor cores ignore the rest


def operand_a(registers: Sequence[Array], kind: str) -> Array:
    """Fragments of a -> [warps, 16, k] in fp64."""
    halves = len(registers) // 2
    bits = rows(*registers).reshape(halves, 2, -1, 8, 4)  # h, r, warp, g, t
    values = _values(np.ascontiguousarray(bits.transpose(2, 1, 3, 0, 4)), kind)
    return values.reshape(values.shape[0], 16, -1)


def operand_b(registers: Sequence[Array], kind: str) -> Array:
    """Fragments of b -> [warps, k, 8] in fp64."""
    bits = rows(*registers).reshape(len(registers), -1, 8, 4)  # h, warp, g, t
    values = _values(np.ascontiguousarray(bits.transpose(1, 2, 0, 3)), kind)
    return np.ascontiguousarray(values.reshape(values.shape[0], 8, -1).transpose(0, 2, 1))


def rows(*registers: Array) -> Array:
    """As one array [registers, threads]."""
    return np.concatenate(registers).reshape(len(registers), -1)


def multiply(a: Array, b: Array, c: Array, truncate: bool) -> Array:
    """a b + c -> fragments of d, [4, threads] in fp32: the exact sum, up to fp64, rounded once."""
    product = np.matmul(a, b).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    product += c
    return toward_zero(product) if truncate else product.astype(F32)


def pack_halves(d: Array) -> list[Array]:
    """Fragments of d in fp32 -> the two registers of fp16 pairs."""
    bits = d.astype(F16).view(U16).astype(U32)
    return [bits[0] | bits[1] << U32(16), bits[2] | bits[3] << U32(16)]


def unpack_halves(c: Sequence[Array]) -> list[Array]:
    """The reverse."""
    return [half.astype(F32) for pair in c for half in halves_f16(pair)]


def from_rows(matrices: Array, transposed: bool) -> Array:
    """Rows of matrices [warps, n, 8, 16 bytes] as uint8 -> registers [n, threads]."""
    warps, n = matrices.shape[:2]
    if transposed:
        matrices = np.ascontiguousarray(matrices.view(U16).transpose(0, 1, 3, 2))  # [warps, n, column, row]
    return matrices.view(U32).reshape(warps, n, 32).transpose(1, 0, 2).reshape(n, -1)


def to_rows(registers: Sequence[Array], transposed: bool) -> Array:
    """Registers -> rows of matrices [warps, n, 8, 16 bytes] as uint8."""
    n = len(registers)
    bits = np.ascontiguousarray(rows(*registers).reshape(n, -1, 8, 4).transpose(1, 0, 2, 3))
    if transposed:
        bits = np.ascontiguousarray(bits.view(U16).transpose(0, 1, 3, 2))
    return bits.view(np.uint8).reshape(-1, n, 8, 16)
