"""Tiles of the stream: the device functions that the kernels are put together from.

A stream [tokens, n*c] is read as rows [tokens * n, c], one row per slot. A tile is R rows, the slots of R / n tokens.
What mixes slots is then a product with a matrix [R, R] that is zero between tokens, and what the coefficients need are
products of rows with rows; both run on tensor cores. In such a product zero times what is not finite would reach other
tokens, so rows are `finite` there, and a token with a row that is not has coefficients of NaN.

A sub-layer's input and output [tokens, m*c] have m rows per token, one per fraction. In a tile those of the input and
its gradient lie in the rows of the first m slots, the others are zero; the output is repeated, for every slot that it
is written to.

A tile is read in chunks [W, R, K]: W warps with K columns each. Products keep the first axis, so that a warp holds only
its own columns, and what they say of whole rows is summed over the warps once per tile.

Coefficients are tables [R, KP], a row per slot: beta, gamma_1..m, alpha_1..n, padding. A product with rows of 16
bits is taken with two 16-bit halves of them, which in bf16 keep 16 of fp32's 24 bits: far more than the rows have.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Site(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        N: slots.
        M: fractions, a divisor of N.
        C: columns of a slot, and of a fraction.
        R: rows of a tile, a multiple of N and of 16.
        W: warps, each with its own columns of a chunk.
        K: columns of a warp in a chunk, a power of two.
        L: rows that the lanes of a warp hold at a time.
        CHUNKS: chunks of W * K columns that cover C.
        KP: columns of a table, 1 + M + N padded to a power of two.
        FROM, TO: columns of a table that are predicted per token, rows of the projection: all, beta, those behind it,
            or none.
        NORM, EPS: norm of a slot before the prediction: none, rmsnorm, layernorm.
        TANH: the prediction is bounded.
        SUB_NORM, SUB_EPS: norm of the sub-layer's input in the same pass: none, rmsnorm, layernorm.
        ONE_PLUS: that norm's weight is stored less one.
        EXACT: products in fp32 (as three of TF32 on tensor cores) rather than in the stream's 16 bits.
    """

    N: int
    M: int
    C: int
    R: int
    W: int
    K: int
    L: int
    CHUNKS: int
    KP: int
    FROM: int
    TO: int
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
def of_fraction(row, S: tl.constexpr):
    """The row of a sub-layer's input or output that goes with a row of the stream, of fraction j mod m."""
    if S.N == S.M:
        return row
    return row // S.N * S.M + row % S.M


@triton.jit
def place(pointer, first, count, n, S: tl.constexpr, OF: tl.constexpr):
    """Where chunk n of a tile is in memory, and what of it is there, both [L, W, R / L, K].

    Args:
        first, count: rows of the stream: the tile's first, and all.
        OF: whose rows they are: of slots; of fractions, which only the first slots of a token have; of turns, in which
            every slot has that of its fraction.
    """
    rows = by_lanes(S.R, S)
    mask = (first + rows < count) & inside(n, S)
    if OF != "slots":
        if OF == "fractions" and S.N > S.M:
            mask = mask & (rows % S.N < S.M)
        first, rows = of_fraction(first, S), of_fraction(rows, S)
    return chunk(pointer, first, n, S) + rows * S.C + columns(S), mask


@triton.jit
def gathered(values, S: tl.constexpr):
    """[L, W, N / L, K] as loads have it to [W, N, K] as products want it."""
    return tl.reshape(tl.permute(values, 1, 2, 0, 3), [S.W, values.shape[2] * S.L, S.K])


@triton.jit
def spread(values, S: tl.constexpr):
    """The reverse."""
    return tl.permute(tl.reshape(values, [S.W, values.shape[1] // S.L, S.L, S.K]), 2, 0, 1, 3)


@triton.jit
def ask(pointer, first, count, n, S: tl.constexpr, OF: tl.constexpr):
    """Load chunk n of a tile as lanes have it, [L, W, R / L, K] in the tensor's own dtype; arguments as of `place`.

    Zero outside, also behind the last chunk. A load that is carried from one chunk to the next has arrived when it is
    `gathered`, so that rows come at the memory's rate and not one latency after another.
    """
    at, mask = place(pointer, first, tl.where(n < S.CHUNKS, count, 0), n, S, OF)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_chunk(pointer, first, count, n, S: tl.constexpr, OF: tl.constexpr):
    """Chunk n of a tile, [W, R, K] in the tensor's own dtype; zero outside."""
    return gathered(ask(pointer, first, count, n, S, OF), S)


@triton.jit
def store_chunk(pointer, values, first, count, n, S: tl.constexpr, OF: tl.constexpr):
    at, mask = place(pointer, first, count, n, S, OF)
    tl.store(at, spread(values.to(pointer.dtype.element_ty), S), mask=mask)


@triton.jit
def over_turns(values, S: tl.constexpr):
    """Sum of [W, R, K] over the slots that stand for the same fraction of a token, repeated in their rows.

    Without a product of matrices, in which what is not finite would be lost or reach other tokens.
    """
    if S.N == S.M:
        return values
    turns = tl.reshape(values, [S.W, S.R // S.N, S.N // S.M, S.M, S.K])
    sums = tl.broadcast_to(tl.sum(turns, axis=2, keep_dims=True), turns.shape)
    return tl.reshape(sums, [S.W, S.R, S.K])


@triton.jit
def load_weight(pointer, n, S: tl.constexpr):
    """Chunk n of a weight or bias [d], repeated for every token and turn of a tile: [W, R, K] in fp32."""
    at = by_lanes(S.R, S) % S.M * S.C + columns(S)
    return gathered(tl.load(pointer + n * (S.W * S.K) + at, mask=inside(n, S), other=0.0), S).to(tl.float32)


@triton.jit
def predicted(k, S: tl.constexpr):
    """Which of the columns k of a table are predicted."""
    if S.FROM == 0:
        return k < S.TO
    return (k >= S.FROM) & (k < S.TO)


@triton.jit
def load_projection(p, n, like, S: tl.constexpr):
    """Chunk n of the dynamic weight with the norm's weight folded in, [W, KP, K], ready for products with rows."""
    k = by_lanes(S.KP, S)
    mask = predicted(k, S) & inside(n, S)
    weight = tl.load(p.dynamic_weight + n * (S.W * S.K) + (k - S.FROM) * S.C + columns(S), mask=mask, other=0.0)
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
    token = tl.arange(0, S.R) // S.N
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
    return tl.sum(tl.where(tl.arange(0, S.KP)[None, :] <= S.M + S.N, products, 0.0), axis=1)


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
