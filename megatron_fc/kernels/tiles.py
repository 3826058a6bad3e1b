"""What a program does with its tile: device functions that the kernels are put together from.

A stream [tokens, d] is read as rows [tokens * m, c], one row per fraction. A tile is R rows, the fractions of R / m
tokens, in chunks of columns. What mixes fractions is then a product with a matrix [R, R] that is zero between tokens,
and what the coefficients need are products of rows with rows; both run on tensor cores.

Coefficients are tables [R, KP], a row per fraction: beta, gamma_1..m, alpha_1..m, padding. They are never rounded below
fp32: a product with rows of 16 bits is taken with two 16-bit halves of the coefficients.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Site(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        M: fractions.
        C: columns of a fraction.
        R: rows of a tile, a multiple of M and of 16.
        BC: columns of a chunk, a power of two.
        CHUNKS: chunks that cover C.
        KP: columns of a table, 2M + 1 padded to a power of two.
        DYNAMIC: coefficients are predicted per token.
        NORM, EPS: norm of a fraction before the prediction: none, rmsnorm, layernorm.
        TANH: the prediction is bounded.
        SUB_NORM, SUB_EPS: norm of the sub-layer's input in the same pass: none, rmsnorm, layernorm.
        ONE_PLUS: that norm's weight is stored less one.
        EXACT: products in fp32 (as three of TF32 on tensor cores) rather than in the stream's 16 bits.
        KEEP_ROWS: a tile's rows stay in registers between two uses; otherwise they are read again, from cache.
        KEEP_WEIGHTS: the same of the weights between two tiles.
    """

    M: int
    C: int
    R: int
    BC: int
    CHUNKS: int
    KP: int
    DYNAMIC: bool
    NORM: str
    EPS: float
    TANH: bool
    SUB_NORM: str
    SUB_EPS: float
    ONE_PLUS: bool
    EXACT: bool
    KEEP_ROWS: bool
    KEEP_WEIGHTS: bool


@triton.jit
def offsets(rows, n: tl.constexpr, S: tl.constexpr):
    """Element offsets [rows, BC] of chunk n of a few rows, and which of its columns exist [BC]."""
    columns = n * S.BC + tl.arange(0, S.BC)
    return rows[:, None] * S.C + columns[None, :], columns < S.C


@triton.jit
def load_chunk(pointer, first, count, n: tl.constexpr, S: tl.constexpr):
    """Chunk n of the rows from `first` on, [R, BC] in the tensor's own dtype; zero outside."""
    rows = tl.arange(0, S.R)
    at, inside = offsets(rows, n, S)
    mask = (first + rows < count)[:, None] & inside[None, :]
    return tl.load(pointer + first.to(tl.int64) * S.C + at, mask=mask, other=0.0)


@triton.jit
def store_chunk(pointer, values, first, count, n: tl.constexpr, S: tl.constexpr):
    rows = tl.arange(0, S.R)
    at, inside = offsets(rows, n, S)
    mask = (first + rows < count)[:, None] & inside[None, :]
    tl.store(pointer + first.to(tl.int64) * S.C + at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(pointer, n: tl.constexpr, S: tl.constexpr):
    """Chunk n of the sub-layer norm's weight or bias [d], repeated for every token of a tile: [R, BC] in fp32."""
    at, inside = offsets(tl.arange(0, S.R) % S.M, n, S)
    return tl.load(pointer + at, mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_projection(p, n: tl.constexpr, like, S: tl.constexpr):
    """Chunk n of the dynamic weight with the norm's weight folded in, [KP, BC], ready for products with rows."""
    k = tl.arange(0, S.KP)
    at, inside = offsets(k, n, S)
    weight = tl.load(p.dynamic_weight + at, mask=(k < 2 * S.M + 1)[:, None] & inside[None, :], other=0.0)
    if p.norm_weight is not None:
        columns = n * S.BC + tl.arange(0, S.BC)
        weight *= tl.load(p.norm_weight + columns, mask=inside, other=0.0)[None, :]
    return weight if S.EXACT else weight.to(like.dtype.element_ty)


@triton.jit
def rows_by_rows(a, b, total, S: tl.constexpr):
    """total + a b^T for row chunks [R, BC] and [R' or KP, BC]."""
    if S.EXACT:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), total, input_precision="tf32x3")
    return tl.dot(a, tl.trans(b), total)


@triton.jit
def table_by_rows(table, b, S: tl.constexpr):
    """table b for a table in fp32 and a row chunk, to fp32 accuracy of the table."""
    if S.EXACT:
        return tl.dot(table, b.to(tl.float32), input_precision="tf32x3")
    high = table.to(b.dtype)
    low = (table - high.to(tl.float32)).to(b.dtype)
    return tl.dot(low, b, tl.dot(high, b))


@triton.jit
def same_token(S: tl.constexpr):
    """[R, R]: true where both rows belong to one token."""
    token = tl.arange(0, S.R) // S.M
    return token[:, None] == token[None, :]


@triton.jit
def token_sum(values, S: tl.constexpr):
    """Sum of [R] over the rows of each token, repeated in these rows."""
    return tl.sum(tl.where(same_token(S), values[None, :], 0.0), axis=1)


@triton.jit
def from_table(table, FIRST: tl.constexpr, S: tl.constexpr):
    """The matrix [R, R] of the coefficients in columns FIRST .. FIRST + M of a table: zero between tokens."""
    index = tl.zeros([S.R, S.R], tl.int32) + (FIRST + tl.arange(0, S.R) % S.M)[None, :]
    return tl.where(same_token(S), tl.gather(table, index, axis=1), 0.0)


@triton.jit
def to_table(matrix, FIRST: tl.constexpr, S: tl.constexpr):
    """The reverse: a table [R, KP] with the coefficients of a matrix in columns FIRST .. FIRST + M, else zero."""
    k = tl.arange(0, S.KP)[None, :]
    inside = (k >= FIRST) & (k < FIRST + S.M)
    first_row = (tl.arange(0, S.R) // S.M * S.M)[:, None]
    index = tl.where(inside, first_row + k - FIRST, first_row + tl.zeros_like(k))
    return tl.where(inside, tl.gather(matrix, index, axis=1), 0.0)


@triton.jit
def static_table(p, S: tl.constexpr):
    """The static coefficients as a table."""
    i = (tl.arange(0, S.R) % S.M)[:, None]
    k = tl.arange(0, S.KP)[None, :]
    beta = tl.load(p.static_beta + i + 0 * k, mask=k < 1, other=0.0)
    gamma = tl.load(p.static_gamma + i * S.M + k - 1, mask=(k >= 1) & (k < 1 + S.M), other=0.0)
    alpha = tl.load(p.static_alpha + i * S.M + k - 1 - S.M, mask=(k > S.M) & (k < 1 + 2 * S.M), other=0.0)
    return beta + gamma + alpha


@triton.jit
def scales(p, S: tl.constexpr):
    """The scale of each column of a table, [KP]; 1 without scales."""
    k = tl.arange(0, S.KP)
    out = tl.full([S.KP], 1.0, tl.float32)
    if p.scale_alpha is not None:
        out = tl.where(k == 0, tl.load(p.scale_beta), tl.load(p.scale_alpha))
    return out


@triton.jit
def tanh(z):
    """Without a library call, which the interpreter lacks; the series keeps small values accurate."""
    square = z * z
    series = z * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.04, series, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def moments(sums, squares, NORM: tl.constexpr, EPS: tl.constexpr, width: tl.constexpr):
    """Mean and reciprocal deviation from sums and sums of squares over `width` values, as a norm uses them."""
    mean = tl.zeros_like(sums)
    if NORM == "layernorm":
        mean = sums / width
    deviation = tl.zeros_like(sums) + 1.0
    if NORM != "none":
        deviation = tl.rsqrt(squares / width - mean * mean + EPS)
    return mean, deviation
