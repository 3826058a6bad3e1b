"""Algebra on coefficients, once per token: tables with a row per slot, a token in a warp and a coefficient in a lane.

Those of gamma have M columns, of alpha and of products of slots N, of beta and of z's deviations one.
"""

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
def table_row(COLUMNS: gl.constexpr, S: gl.constexpr):
    """The rows of a table with so many columns, [R, 1]."""
    return gl.arange(0, S.R, layout=gl.SliceLayout(1, layouts.table(S.N, S.W, S.R, COLUMNS)))[:, None]


@gluon.jit
def coefficient(COLUMNS: gl.constexpr, S: gl.constexpr):
    """The columns of a table, [1, COLUMNS]."""
    return gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layouts.table(S.N, S.W, S.R, COLUMNS)))[None, :]


@gluon.jit
def beside(rows, COLUMNS: gl.constexpr, S: gl.constexpr):
    """[R] of one table's rows as [R, 1] beside a table with so many columns."""
    return gl.convert_layout(rows, gl.SliceLayout(1, layouts.table(S.N, S.W, S.R, COLUMNS)))[:, None]


@gluon.jit
def to_tokens(values, S: gl.constexpr):
    """A table [R, COLUMNS] as [R / N, N, COLUMNS]."""
    COLUMNS: gl.constexpr = values.shape[1]
    values = gl.reshape(values, [S.R // S.N, S.N, COLUMNS])
    return gl.convert_layout(values, layouts.by_token(S.N, S.W, S.R, COLUMNS))


@gluon.jit
def from_tokens(values, S: gl.constexpr):
    """The reverse."""
    COLUMNS: gl.constexpr = values.shape[2]
    return gl.convert_layout(gl.reshape(values, [S.R, COLUMNS]), layouts.table(S.N, S.W, S.R, COLUMNS))


@gluon.jit
def product(a, b):
    """a b, rounded before anything is added to it.

    Else lanes that exchange products add one that is rounded and one that is not, and their copies of a sum differ.
    """
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def token_sum(values):
    """Sum of [T, N, COLUMNS] over each token's values, [T, 1, 1]."""
    return gl.expand_dims(gl.expand_dims(gl.sum(gl.sum(values, axis=2), axis=1), 1), 2)


@gluon.jit
def matrix_product(a, b, S: gl.constexpr):
    """a b of each token, [T, N, COLUMNS], for [T, N, N] and [T, N, COLUMNS]."""
    COLUMNS: gl.constexpr = b.shape[2]
    over: gl.constexpr = layouts.summed(S.N, S.W, S.R, COLUMNS, 2)
    a = gl.convert_layout(a, gl.SliceLayout(3, over))[:, :, :, None]
    b = gl.convert_layout(b, gl.SliceLayout(1, over))[:, None, :, :]
    return gl.convert_layout(gl.sum(a * b, axis=2), layouts.by_token(S.N, S.W, S.R, COLUMNS))


@gluon.jit
def with_transposed(a, S: gl.constexpr):
    """a a^T of each token, [T, N, N], for as many columns as slots."""
    over: gl.constexpr = layouts.summed(S.N, S.W, S.R, S.N, 3)
    b = gl.convert_layout(a, gl.SliceLayout(1, over))[:, None, :, :]
    a = gl.convert_layout(a, gl.SliceLayout(2, over))[:, :, None, :]
    return gl.convert_layout(gl.sum(a * b, axis=3), layouts.by_token(S.N, S.W, S.R, S.N))


@gluon.jit
def load_table(pointer, COLUMNS: gl.constexpr, S: gl.constexpr):
    """Static coefficients [N, COLUMNS] as a table [R, COLUMNS]."""
    return gl.load(pointer + table_row(COLUMNS, S) % S.N * COLUMNS + coefficient(COLUMNS, S))


@gluon.jit
def store_table(pointer, values, first, count, S: gl.constexpr):
    """A table [R, COLUMNS] of the rows from `first` on; rows from `count` on are not there."""
    COLUMNS: gl.constexpr = values.shape[1]
    row = first + table_row(COLUMNS, S)
    gl.store(pointer + row * COLUMNS + coefficient(COLUMNS, S), values, mask=row < count)


@gluon.jit
def static_coefficients(p, S: gl.constexpr):
    """gamma [R, M], alpha [R, N] and beta [R, 1] before the prediction is added, and the scales of alpha and beta."""
    scale_alpha, scale_beta = 1.0, 1.0
    if p.scale_alpha is not None:
        scale_alpha, scale_beta = gl.load(p.scale_alpha), gl.load(p.scale_beta)
    gamma, alpha = load_table(p.static_gamma, S.M, S), load_table(p.static_alpha, S.N, S)
    return gamma, alpha, load_table(p.static_beta, 1, S), scale_alpha, scale_beta


@gluon.jit
def bounded(z, S: gl.constexpr):
    return tanh(z) if S.TANH else z


@gluon.jit
def total_of_warps(memory, FIRST: gl.constexpr, COLUMNS: gl.constexpr, S: gl.constexpr):
    """Columns of products [W, R, ...] of the warps, summed over these: a table [R, COLUMNS]."""
    part = memory.slice(FIRST, COLUMNS, dim=2)
    return gl.sum(part.load(layouts.over_warps(S.N, S.W, S.R, COLUMNS)), axis=0)


@gluon.jit
def predictions(z_s, gram, S: gl.constexpr):
    """z of gamma [R, M], alpha [R, N] and beta [R, 1] (eq. 9-14), the reciprocal deviation of rows, NaN for bad ones.

    z_s: products of rows with the projection by warp; gram: products of rows with each other.
    """
    z_alpha = total_of_warps(z_s, 0, S.N, S)
    z_gamma = total_of_warps(z_s, S.N, S.M, S)
    z_beta = total_of_warps(z_s, S.M + S.N, 1, S)
    square, spoilt = squares(gram, S)
    deviation = gl.zeros_like(square) + 1.0
    if S.NORM == "rmsnorm":
        deviation = gl.rsqrt(square / S.C + S.EPS)
        z_gamma *= beside(deviation, S.M, S)
        z_alpha *= beside(deviation, S.N, S)
        z_beta *= beside(deviation, 1, S)
    return z_gamma, z_alpha, z_beta, deviation, spoilt


@gluon.jit
def squares(gram, S: gl.constexpr):
    """Products of rows with themselves [R], and NaN for those that are not finite, else zero."""
    square = gl.sum(gl.where(table_row(S.N, S) % S.N == coefficient(S.N, S), gram, 0.0), axis=1)
    return square, gl.where(is_finite(square), 0.0, float("nan"))


@gluon.jit
def given_coefficients(pointer, gram, COLUMNS: gl.constexpr, first, count, S: gl.constexpr):
    """A table [R, COLUMNS] of the rows from `first` on, NaN for bad rows; zero from `count` on."""
    row = first + table_row(COLUMNS, S)
    values = gl.load(pointer + row * COLUMNS + coefficient(COLUMNS, S), mask=row < count, other=0.0)
    _, spoilt = squares(gram, S)
    return values + beside(spoilt, COLUMNS, S)


@gluon.jit
def input_deviation(gamma, gram, S: gl.constexpr):
    """Of x = gamma^T h of each token [T, 1, 1], and the products (h_i, x_j) [T, N, M], both without x itself."""
    with_x = matrix_product(gram, gamma, S)
    return gl.rsqrt(token_sum(product(gamma, with_x)) / (S.M * S.C) + S.SUB_EPS), with_x


@gluon.jit
def in_token(matrix, S: gl.constexpr):
    """Of products of rows [W, R, R], those within a token: [W, R, N]."""
    r, k = gl.arange(0, S.R), gl.arange(0, S.R)
    matrix = gl.where((r // S.N)[None, :, None] == (k // S.N)[None, None, :], matrix, 0.0)
    return gl.sum(gl.reshape(matrix, [S.W, S.R, S.R // S.N, S.N]), axis=2)


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
