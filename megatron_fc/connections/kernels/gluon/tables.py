"""Algebra on coefficients, once per token: tables [R, M] with a token in a warp and a coefficient in a lane."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megatron_fc.connections.kernels.gluon import layouts


@gluon.jit
def tanh(z):
    """As `megatron_fc.connections.kernels.tiles.tanh`, which is not of this language."""
    square = z * z
    series = z * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return gl.where(square < 0.04, series, 1.0 - 2.0 / (gl.exp(2.0 * z) + 1.0))


@gluon.jit
def is_finite(values):
    return gl.abs(values) < float("inf")


@gluon.jit
def table_row(S: gl.constexpr):
    """The rows of a table, [R, 1]."""
    return gl.arange(0, S.R, layout=gl.SliceLayout(1, layouts.table(S.M, S.W, S.R)))[:, None]


@gluon.jit
def fraction(S: gl.constexpr):
    """The fraction of each row of a table, [R, 1]."""
    return table_row(S) % S.M


@gluon.jit
def coefficient(S: gl.constexpr):
    """The column of a table, [1, M]."""
    return gl.arange(0, S.M, layout=gl.SliceLayout(0, layouts.table(S.M, S.W, S.R)))[None, :]


@gluon.jit
def column_row(S: gl.constexpr):
    """The rows of a column [R, 1] of beta."""
    return gl.arange(0, S.R, layout=gl.SliceLayout(1, layouts.column(S.M, S.W, S.R)))[:, None]


@gluon.jit
def to_column(rows, S: gl.constexpr):
    """[R] of a table's rows to a column [R, 1]."""
    return gl.convert_layout(rows, gl.SliceLayout(1, layouts.column(S.M, S.W, S.R)))[:, None]


@gluon.jit
def to_tokens(values, S: gl.constexpr):
    """A table [R, M] as [R / M, M, M]."""
    values = gl.reshape(values, [S.R // S.M, S.M, S.M])
    return gl.convert_layout(values, layouts.by_token(S.M, S.W, S.R))


@gluon.jit
def from_tokens(values, S: gl.constexpr):
    """The reverse."""
    return gl.convert_layout(gl.reshape(values, [S.R, S.M]), layouts.table(S.M, S.W, S.R))


@gluon.jit
def token_sum(values):
    """Sum of [T, M, M] over each token's values, [T, 1, 1]."""
    return gl.expand_dims(gl.expand_dims(gl.sum(gl.sum(values, axis=2), axis=1), 1), 2)


@gluon.jit
def matrix_product(a, b, S: gl.constexpr):
    """a b of each token, [T, M, M]."""
    over: gl.constexpr = layouts.summed(S.M, S.W, S.R, 2)
    a = gl.convert_layout(a, gl.SliceLayout(3, over))[:, :, :, None]
    b = gl.convert_layout(b, gl.SliceLayout(1, over))[:, None, :, :]
    return gl.convert_layout(gl.sum(a * b, axis=2), layouts.by_token(S.M, S.W, S.R))


@gluon.jit
def with_transposed(a, S: gl.constexpr):
    """a a^T of each token, [T, M, M]."""
    over: gl.constexpr = layouts.summed(S.M, S.W, S.R, 3)
    b = gl.convert_layout(a, gl.SliceLayout(1, over))[:, None, :, :]
    a = gl.convert_layout(a, gl.SliceLayout(2, over))[:, :, None, :]
    return gl.convert_layout(gl.sum(a * b, axis=3), layouts.by_token(S.M, S.W, S.R))


@gluon.jit
def static_coefficients(p, S: gl.constexpr):
    """gamma, alpha [R, M] and beta [R, 1] before the prediction is added, and the scales of alpha and beta."""
    at = fraction(S) * S.M + coefficient(S)
    scale_alpha, scale_beta = 1.0, 1.0
    if p.scale_alpha is not None:
        scale_alpha, scale_beta = gl.load(p.scale_alpha), gl.load(p.scale_beta)
    beta = gl.load(p.static_beta + column_row(S) % S.M)
    return gl.load(p.static_gamma + at), gl.load(p.static_alpha + at), beta, scale_alpha, scale_beta


@gluon.jit
def bounded(z, S: gl.constexpr):
    return tanh(z) if S.TANH else z


@gluon.jit
def predictions(z_s, gram, S: gl.constexpr):
    """z of gamma, alpha [R, M] and beta [R, 1] (eq. 9-14), the reciprocal deviation of rows, NaN for bad ones.

    z_s: products of rows with the projection by warp; gram: products of rows with each other.
    """
    M: gl.constexpr = S.M
    of_table: gl.constexpr = layouts.over_warps(M, S.W, S.R, M)
    of_column: gl.constexpr = layouts.over_warps(M, S.W, S.R, 1)
    z_gamma = gl.sum(z_s.slice(0, M, dim=2).load(of_table), axis=0)
    z_alpha = gl.sum(z_s.slice(M, M, dim=2).load(of_table), axis=0)
    z_beta = gl.sum(z_s.slice(2 * M, 1, dim=2).load(of_column), axis=0)
    square = gl.sum(gl.where(fraction(S) == coefficient(S), gram, 0.0), axis=1)
    spoilt = gl.where(is_finite(square), 0.0, float("nan"))
    deviation = gl.zeros_like(square) + 1.0
    if S.NORM == "rmsnorm":
        deviation = gl.rsqrt(square / S.C + S.EPS)
        z_gamma *= deviation[:, None]
        z_alpha *= deviation[:, None]
        z_beta *= to_column(deviation, S)
    return z_gamma, z_alpha, z_beta, deviation, spoilt


@gluon.jit
def input_deviation(gamma, gram, S: gl.constexpr):
    """Of x = gamma^T h of each token [T, 1, 1], and the products (h_i, x_j) [T, M, M], both without x itself."""
    with_x = matrix_product(gram, gamma, S)
    return gl.rsqrt(token_sum(gamma * with_x) / (S.M * S.C) + S.SUB_EPS), with_x


@gluon.jit
def in_token(matrix, S: gl.constexpr):
    """Of products of rows [W, R, R], those within a token: [W, R, M]."""
    r, k = gl.arange(0, S.R), gl.arange(0, S.R)
    matrix = gl.where((r // S.M)[None, :, None] == (k // S.M)[None, None, :], matrix, 0.0)
    return gl.sum(gl.reshape(matrix, [S.W, S.R, S.R // S.M, S.M]), axis=2)


@gluon.jit
def two_halves(value, dtype: gl.constexpr):
    """fp32 as a sum of two 16-bit values."""
    high = value.to(dtype)
    return high, (value - high.to(gl.float32)).to(dtype)


@gluon.jit
def store_matrix(memory, values, S: gl.constexpr):
    """A table [R, M] as a matrix [R, R] that is zero between tokens, in two halves [2, R, R] for all warps."""
    T: gl.constexpr = S.R // S.M
    values = gl.convert_layout(values, gl.SliceLayout(1, layouts.blocks(S.M, S.W, S.R)))[:, None, :]
    own = (gl.arange(0, S.R) // S.M)[:, None, None] == gl.arange(0, T)[None, :, None]
    high, low = two_halves(gl.reshape(gl.where(own, values, 0.0), [S.R, S.R]), memory.dtype)
    memory.index(0).store(high)
    memory.index(1).store(low)


@gluon.jit
def store_columns(memory, values, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Columns of a table [R, KP] in two halves."""
    high, low = two_halves(values, memory.dtype)
    memory.index(0).slice(FIRST, COUNT, dim=1).store(high)
    memory.index(1).slice(FIRST, COUNT, dim=1).store(low)


@gluon.jit
def some_row(flags, S: gl.constexpr):
    """1 if a row of the tile has its flag, else 0: a scalar, the same in every thread."""
    return gl.max(flags.load(layouts.everywhere(S.W, S.R)), axis=0)
