"""Gradients of coefficients, once per token, and their sums over tokens: tables as in `gluon.tables`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.tables import (
    beside,
    bounded,
    from_tokens,
    given_coefficients,
    input_deviation,
    predictions,
    product,
    store_table,
    to_tokens,
    token_sum,
)


@gluon.jit
def no_table_sums(S: gl.constexpr):
    """Of a program: for gamma, alpha and beta, and for their scales."""
    gamma = gl.zeros([S.R, S.M], gl.float32, layouts.table(S.N, S.W, S.R, S.M))
    alpha = gl.zeros([S.R, S.N], gl.float32, layouts.table(S.N, S.W, S.R, S.N))
    beta = gl.zeros([S.R, 1], gl.float32, layouts.table(S.N, S.W, S.R, 1))
    return gamma, alpha, beta, gamma, alpha, beta


@gluon.jit
def coefficient_gradients(z_s, gram, with_u, d_alpha, d_beta_s, fixed, sums, S: gl.constexpr):
    """What the second pass needs of a token's coefficients, and the sums with theirs added.

    Args:
        z_s: products of rows with the projection, by warp.
        gram, with_u, d_alpha: products of rows of h with those of h [R, N], of u = g_x times the sub-layer norm's
            weight [R, M] and of g_mixed [R, N].
        d_beta_s: gradient of beta [R], in memory.
        fixed: static coefficients and scales.
        sums: of `no_table_sums`.

    Returns:
        Coefficients of x [R, M], by its norm's deviation, and of the mixed residual [R, N]; mean of u times x
        [T, 1, 1]; what of h itself is taken off its gradient [R]; gradients of z of gamma, alpha and beta by the slots'
        deviation; NaN for bad rows [R].
    """
    s_gamma, s_alpha, _, scale_alpha, scale_beta = fixed
    z_gamma, z_alpha, z_beta, deviation, spoilt = predictions(z_s, gram, S)
    t_gamma, t_alpha, t_beta = bounded(z_gamma, S), bounded(z_alpha, S), bounded(z_beta, S)
    gamma = s_gamma + scale_alpha * t_gamma + beside(spoilt, S.M, S)
    alpha = s_alpha + scale_alpha * t_alpha + beside(spoilt, S.N, S)

    along, d_gamma, into_x = input_gradients(gamma, gram, with_u, S)
    d_beta = d_beta_s.load(gl.SliceLayout(1, layouts.table(S.N, S.W, S.R, 1)))[:, None]
    dz_gamma, dz_alpha, dz_beta = d_gamma * scale_alpha, d_alpha * scale_alpha, d_beta * scale_beta
    if S.TANH:
        dz_gamma *= 1.0 - t_gamma * t_gamma
        dz_alpha *= 1.0 - t_alpha * t_alpha
        dz_beta *= 1.0 - t_beta * t_beta
    slope = gl.zeros_like(deviation)
    if S.NORM == "rmsnorm":
        slope += gl.sum(product(dz_alpha, z_alpha), axis=1)
        slope += gl.convert_layout(gl.sum(product(dz_gamma, z_gamma), axis=1), slope.type.layout)
        slope += gl.convert_layout(gl.sum(product(dz_beta, z_beta), axis=1), slope.type.layout)
        slope *= deviation * deviation / S.C
    dz_gamma *= beside(deviation, S.M, S)
    dz_alpha *= beside(deviation, S.N, S)
    dz_beta *= beside(deviation, 1, S)
    found = (into_x, alpha, along, slope, (dz_gamma, dz_alpha, dz_beta), spoilt)
    added = (
        sums[0] + d_gamma,
        sums[1] + d_alpha,
        sums[2] + d_beta,
        sums[3] + d_gamma * t_gamma,
        sums[4] + d_alpha * t_alpha,
        sums[5] + d_beta * t_beta,
    )
    return found, added


@gluon.jit
def input_gradients(gamma, gram, with_u, S: gl.constexpr):
    """Mean of u times x [T, 1, 1], the gradient of gamma [R, M], and gamma by the deviation of x, if that is normed."""
    gamma3 = to_tokens(gamma, S)
    if S.SUB_NORM == "rmsnorm":
        sub, with_x = input_deviation(gamma3, to_tokens(gram, S), S)
        with_u3 = to_tokens(with_u, S)
        along = token_sum(product(gamma3, with_u3)) / (S.M * S.C) * sub
        d_gamma = from_tokens(sub * (with_u3 - along * sub * with_x), S)
        into_x = from_tokens(sub * gamma3, S)
    else:
        along, d_gamma, into_x = token_sum(gl.zeros_like(gamma3)), with_u, gamma
    return along, d_gamma, into_x


@gluon.jit
def given_gradients(gram, with_u, d_alpha, given, first, count, S: gl.constexpr):
    """Of coefficients that are given, stored; returns those of x and of the mixed residual, and the mean of u times x.

    gram, with_u, d_alpha: as of `coefficient_gradients`.
    """
    gamma = given_coefficients(given.gamma, gram, S.M, first, count, S)
    along, d_gamma, into_x = input_gradients(gamma, gram, with_u, S)
    store_table(given.g_gamma, d_gamma, first, count, S)
    store_table(given.g_alpha, d_alpha, first, count, S)
    return into_x, given_coefficients(given.alpha, gram, S.N, first, count, S), along


@gluon.jit
def over_tokens(table, S: gl.constexpr):
    """[R, COLUMNS] summed to [N, COLUMNS]."""
    return gl.sum(gl.reshape(table, [S.R // S.N, S.N, table.shape[1]]), axis=0)


@gluon.jit
def store_table_part(partial, table, scaled, FIRST: gl.constexpr, S: gl.constexpr):
    """A program's sums for the columns of its table from FIRST on, and for their scales."""
    program = gl.program_id(0)
    table = over_tokens(table, S)
    i = gl.arange(0, S.N, layout=gl.SliceLayout(1, table.type.layout))[:, None]
    k = gl.arange(0, table.shape[1], layout=gl.SliceLayout(0, table.type.layout))[None, :]
    gl.store(partial.table + (program * S.N + i) * S.KP + FIRST + k, table)
    scaled = gl.sum(scaled, axis=0)
    k = gl.arange(0, scaled.shape[0], layout=scaled.type.layout)
    gl.store(partial.scaled + program * S.KP + FIRST + k, scaled)


@gluon.jit
def store_table_sums(partial, sums, S: gl.constexpr):
    """A program's sums for the coefficients and their scales; the padding of both stays as it is."""
    store_table_part(partial, sums[0], sums[3], 1, S)
    store_table_part(partial, sums[1], sums[4], 1 + S.M, S)
    store_table_part(partial, sums[2], sums[5], 0, S)
