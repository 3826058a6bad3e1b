"""Tiles of the stream: the device functions that the kernels are put together from.

A stream [tokens, d] is read as rows [tokens * m, c], one row per fraction. A tile is R rows, the fractions of R / m
tokens. What mixes fractions is then a product with a matrix [R, R] that is zero between tokens, and what the
coefficients need are products of rows with rows; both run on tensor cores. In such a product zero times what is not
finite would reach other tokens, so rows are `finite` there, and a token with a row that is not has coefficients of NaN.

A tile is read in chunks [W, R, K]: W warps with K columns each. Products keep the first axis, so that a warp holds only
its own columns, and what they say of whole rows is summed over the warps once per tile.

Coefficients are tables [R, KP], a row per fraction: beta, gamma_1..m, alpha_1..m, padding. A product with rows of 16
bits is taken with two 16-bit halves of them, which in bf16 keep 16 of fp32's 24 bits: far more than the rows have.
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
        W: warps, each with its own columns of a chunk.
        K: columns of a warp in a chunk, a power of two.
        L: rows that the lanes of a warp hold at a time.
        CHUNKS: chunks of W * K columns that cover C.
        KP: columns of a table, 2M + 1 padded to a power of two.
        DYNAMIC: coefficients are predicted per token.
        NORM, EPS: norm of a fraction before the prediction: none, rmsnorm, layernorm.
        TANH: the prediction is bounded.
        SUB_NORM, SUB_EPS: norm of the sub-layer's input in the same pass: none, rmsnorm, layernorm.
        ONE_PLUS: that norm's weight is stored less one.
        EXACT: products in fp32 (as three of TF32 on tensor cores) rather than in the stream's 16 bits.
    """

    M: int
    C: int
    R: int
    W: int
    K: int
    L: int
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


@triton.jit
def columns(S: tl.constexpr):
    """Columns of the first chunk, [1, W, 1, K]."""
    return tl.arange(0, S.W)[None, :, None, None] * S.K + tl.arange(0, S.K)[None, None, None, :]


@triton.jit
def inside(n, S: tl.constexpr):
    """Which columns of chunk n exist, [1, W, 1, K]."""
    if S.C % (S.W * S.K) == 0:
        return tl.full([1, S.W, 1, S.K], True, tl.int1)
    return columns(S) < S.C - n * (S.W * S.K)


@triton.jit
def by_lanes(N: tl.constexpr, S: tl.constexpr):
    """Indices of N rows, [L, 1, N / L, 1]: the compiler gives the first axis to lanes, so that a warp moves K columns
    of L rows at once and stays within its own columns, without exchange with other warps.
    """
    return tl.arange(0, N // S.L)[None, None, :, None] * S.L + tl.arange(0, S.L)[:, None, None, None]


@triton.jit
def chunk(pointer, first, n, S: tl.constexpr):
    """Where chunk n of the rows from `first` on begins."""
    return pointer + first.to(tl.int64) * S.C + n * (S.W * S.K)


@triton.jit
def gathered(values, S: tl.constexpr):
    """[L, W, N / L, K] as loads have it to [W, N, K] as products want it."""
    return tl.reshape(tl.permute(values, 1, 2, 0, 3), [S.W, values.shape[2] * S.L, S.K])


@triton.jit
def spread(values, S: tl.constexpr):
    """The reverse."""
    return tl.permute(tl.reshape(values, [S.W, values.shape[1] // S.L, S.L, S.K]), 2, 0, 1, 3)


@triton.jit
def ask(pointer, first, count, n, S: tl.constexpr):
    """Load chunk n of the rows from `first` on as lanes have it, [L, W, R / L, K] in the tensor's own dtype.

    Zero outside, also behind the last chunk. A load that is carried from one chunk to the next has arrived when it is
    `gathered`, so that rows come at the memory's rate and not one latency after another.
    """
    rows = by_lanes(S.R, S)
    mask = (first + rows < tl.where(n < S.CHUNKS, count, 0)) & inside(n, S)
    return tl.load(chunk(pointer, first, n, S) + rows * S.C + columns(S), mask=mask, other=0.0)


@triton.jit
def load_chunk(pointer, first, count, n, S: tl.constexpr):
    """Chunk n of the rows from `first` on, [W, R, K] in the tensor's own dtype; zero outside."""
    return gathered(ask(pointer, first, count, n, S), S)


@triton.jit
def store_chunk(pointer, values, first, count, n, S: tl.constexpr):
    rows = by_lanes(S.R, S)
    mask = (first + rows < count) & inside(n, S)
    values = spread(values.to(pointer.dtype.element_ty), S)
    tl.store(chunk(pointer, first, n, S) + rows * S.C + columns(S), values, mask=mask)


@triton.jit
def load_weight(pointer, n, S: tl.constexpr):
    """Chunk n of a weight or bias [d], repeated for every token of a tile: [W, R, K] in fp32."""
    at = by_lanes(S.R, S) % S.M * S.C + columns(S)
    return gathered(tl.load(pointer + n * (S.W * S.K) + at, mask=inside(n, S), other=0.0), S).to(tl.float32)


@triton.jit
def load_projection(p, n, like, S: tl.constexpr):
    """Chunk n of the dynamic weight with the norm's weight folded in, [W, KP, K], ready for products with rows."""
    k = by_lanes(S.KP, S)
    mask = (k < 2 * S.M + 1) & inside(n, S)
    weight = tl.load(p.dynamic_weight + n * (S.W * S.K) + k * S.C + columns(S), mask=mask, other=0.0)
    if p.norm_weight is not None:
        weight *= tl.load(p.norm_weight + n * (S.W * S.K) + columns(S), mask=inside(n, S), other=0.0)
    return gathered(weight if S.EXACT else weight.to(like.dtype.element_ty), S)


@triton.jit
def finite(values):
    """Zero where a value is not finite."""
    return tl.where(is_finite(values), values, 0.0).to(values.dtype)


@triton.jit
def is_finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def rows_by_rows(a, b, total, S: tl.constexpr):
    """total + a b^T of each warp's columns, [W, R, R' or KP], for chunks [W, R, K] and [W, R' or KP, K]."""
    if S.EXACT:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32), 0, 2, 1), total, input_precision="tf32x3")
    return tl.dot(a, tl.trans(b, 0, 2, 1), total)


@triton.jit
def each_warp(table, S: tl.constexpr):
    """A table or matrix [R, N] for every warp, [W, R, N]."""
    return tl.broadcast_to(table[None, :, :], (S.W, table.shape[0], table.shape[1]))


@triton.jit
def table_by_rows(table, b, S: tl.constexpr):
    """table b for a table [N, R] in fp32, as two halves, and a chunk [W, R, K]: [W, N, K] in fp32."""
    if S.EXACT:
        return tl.dot(each_warp(table, S), b.to(tl.float32), input_precision="tf32x3")
    high = table.to(b.dtype)
    low = (table - high.to(tl.float32)).to(b.dtype)
    return tl.dot(each_warp(low, S), b, tl.dot(each_warp(high, S), b))


@triton.jit
def mix(matrix, rows, S: tl.constexpr):
    """matrix rows for coefficients [R, R] that are zero between tokens, and a chunk [W, R, K]: [W, R, K] in fp32.

    What is not finite in the rows is left out, since zero times it would reach other tokens; in its own token the
    coefficients are NaN (`spoiled`).
    """
    return table_by_rows(matrix, finite(rows), S)


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
def row_sum(products, S: tl.constexpr):
    """Sums of the rows of a table of products, the same in all lanes that have a row, to the bit.

    Without a choice in between, a product and the first addition become one operation, which rounds one of two lanes'
    products and not the other's: the lanes exchange theirs and end with different sums. The padding gives the choice.
    """
    return tl.sum(tl.where(tl.arange(0, S.KP)[None, :] <= 2 * S.M, products, 0.0), axis=1)


@triton.jit
def spoiled(products, S: tl.constexpr):
    """NaN in the rows of each token with rows whose products [R, R] are not finite, else zero; [R]."""
    return tl.sum(tl.where(same_token(S) & ~is_finite(products), float("nan"), 0.0), axis=1)


@triton.jit
def diagonal(matrix, S: tl.constexpr):
    """Of a matrix [R, R], [R]."""
    r = tl.arange(0, S.R)
    return tl.sum(tl.where(r[:, None] == r[None, :], matrix, 0.0), axis=1)


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
    """Mean and reciprocal deviation from sums and sums of squares over `width` values, as a norm uses them.

    What rounding leaves of a variance is not negative; its error is that of the mean square, 1e-7 of it.
    """
    mean, deviation = tl.zeros_like(squares), tl.zeros_like(squares) + 1.0
    if NORM == "layernorm":
        mean = sums / width
        deviation = tl.rsqrt(tl.maximum(squares / width - mean * mean, 0.0) + EPS)
    elif NORM == "rmsnorm":
        deviation = tl.rsqrt(tl.maximum(squares / width, 0.0) + EPS)
    return mean, deviation


@triton.jit
def less(values, means, NORM: tl.constexpr):
    """values - means, where the norm takes means: the compiler may not leave out what is zero at run time."""
    return values - means if NORM == "layernorm" else values
