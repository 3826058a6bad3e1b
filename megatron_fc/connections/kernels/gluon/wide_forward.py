"""Width connection and the sub-layer's norm, or a boundary, of slots so wide that few tokens fit into a tile.

Coefficients are predicted here, or given, as those on a manifold are. Reads and writes of rows are those of
`gluon.forward`, whose tables these kernels share; slots are mixed by `gluon.by_columns`. The sub-layer's output is in
registers, asked for with the tile before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.by_columns import (
    chunks,
    columns_of,
    for_tokens,
    for_turns,
    fractions_of,
    from_slots,
    in_token,
    load_all,
    per_row,
    projection_rows,
    rounded,
    rows_of,
    store_rows,
    table_for,
    to_fp32,
    weight_of,
)
from megatron_fc.connections.kernels.gluon.rows import copy_chunk, copy_values, keep_projection
from megatron_fc.connections.kernels.gluon.tables import (
    beside,
    bounded,
    given_coefficients,
    input_deviation,
    predictions,
    static_coefficients,
    store_table,
    to_tokens,
    total_of_warps,
)


@gluon.jit
def store_coefficients(z_s, gram_s, gamma_s, fixed, beta, alpha, first, count, S: gl.constexpr):
    """All algebra between the passes: coefficients for the depth connection, and those of x in shared memory."""
    s_gamma, s_alpha, s_beta, scale_alpha, scale_beta = fixed
    gram = total_of_warps(gram_s.slice(0, S.R, dim=1), 0, S.N, S)
    z_gamma, z_alpha, z_beta, _, spoilt = predictions(z_s.slice(0, S.R, dim=1), gram, S)
    store_table(alpha, s_alpha + scale_alpha * bounded(z_alpha, S) + beside(spoilt, S.N, S), first, count, S)
    store_table(beta, s_beta + scale_beta * bounded(z_beta, S) + beside(spoilt, 1, S), first, count, S)
    store_gamma(gamma_s, s_gamma + scale_alpha * bounded(z_gamma, S) + beside(spoilt, S.M, S), gram, S)


@gluon.jit
def store_given(gram_s, gamma_s, given, first, count, S: gl.constexpr):
    """The same where coefficients are given: those of x alone."""
    gram = total_of_warps(gram_s.slice(0, S.R, dim=1), 0, S.N, S)
    store_gamma(gamma_s, given_coefficients(given.gamma, gram, S.M, first, count, S), gram, S)


@gluon.jit
def store_gamma(gamma_s, gamma, gram, S: gl.constexpr):
    """gamma [R, M] in shared memory, by the deviation of x where it is normed."""
    gamma = to_tokens(gamma, S)
    if S.SUB_NORM == "rmsnorm":
        deviation, _ = input_deviation(gamma, to_tokens(gram, S), S)
        gamma *= deviation
    gamma_s.store(gamma)


@gluon.jit
def wide_forward_kernel(h, pre, given, p, norm, x, beta, alpha, count, S: gl.constexpr):
    """As `megatron_fc.connections.kernels.width.width_forward_kernel`."""
    CHUNKS: gl.constexpr = S.CHUNKS
    T: gl.constexpr = S.R // S.N
    dtype: gl.constexpr = h.dtype.element_ty
    PRODUCTS: gl.constexpr = layouts.products(S.W)
    COLUMNS: gl.constexpr = layouts.columns(S.W, S.R)
    ROWS: gl.constexpr = layouts.rows_in_memory()
    h_s = chunks(dtype, S.R, S)
    if given.gamma is None:
        w_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, projection_rows(S), S.K], ROWS)
        z_s = gl.allocate_shared_memory(gl.float32, [S.W, 16, S.KP], layouts.plain(3))
    gram_s = gl.allocate_shared_memory(gl.float32, [S.W, 16, S.N], layouts.plain(3))
    gamma_s = gl.allocate_shared_memory(gl.float32, [T, S.N, S.M], layouts.plain(3))
    stream = h
    first = gl.program_id(0) * S.R
    if pre.o is not None:
        stream = pre.h
        beta_s = gl.allocate_shared_memory(gl.float32, [S.R], layouts.plain(1))
        alpha_s = gl.allocate_shared_memory(gl.float32, [S.R * S.N], layouts.plain(1))
        o = load_all(pre.o, fractions_of(first, S), fractions_of(count, S), T * S.M, S)
        copy_values(beta_s, pre.beta, first, count, S.R, S)
        copy_values(alpha_s, pre.alpha, first * S.N, count * S.N, S.R * S.N, S)
    for n in gl.static_range(CHUNKS):
        copy_chunk(h_s[n], stream, n, first, count, S)
    async_copy.commit_group()
    if given.gamma is None:
        keep_projection(w_s, p, S)
    weight = ()
    if S.SUB_NORM != "none":
        for n in gl.static_range(CHUNKS):
            weight = weight + (weight_of(norm.weight, n, S),)
    if given.gamma is None:
        fixed = static_coefficients(p, S)

    while first < count:
        following = first + gl.num_programs(0) * S.R
        async_copy.wait_group(0)
        if pre.o is not None:
            for n in gl.static_range(CHUNKS):
                table = table_for(alpha_s.reshape([T, S.N, S.N]), S)
                made = from_slots(table, to_fp32(h_s[n].load(COLUMNS)), S)
                made += per_row(beta_s, S) * for_turns(to_fp32(o[n]), S)
                made = rounded(made, dtype)
                store_rows(h, made, n, first, count, S)
                h_s[n].store(made)
        z = gl.zeros([S.W, 16, S.KP], gl.float32, PRODUCTS)
        gram = gl.zeros([S.W, 16, S.R], gl.float32, PRODUCTS)
        for n in gl.static_range(CHUNKS):
            rows = rows_of(h_s[n], S)
            if given.gamma is None:
                z = mma_v2(rows, columns_of(w_s.index(n), S), z)
            gram = mma_v2(rows, columns_of(h_s[n], S), gram)
        if given.gamma is None:
            z_s.store(z)
        gram_s.store(in_token(gram, S.R, S.N, S))
        if pre.o is not None:
            o = load_all(pre.o, fractions_of(following, S), fractions_of(count, S), T * S.M, S)
            copy_values(beta_s, pre.beta, following, count, S.R, S)
            copy_values(alpha_s, pre.alpha, following * S.N, count * S.N, S.R * S.N, S)
        if given.gamma is None:
            store_coefficients(z_s, gram_s, gamma_s, fixed, beta, alpha, first, count, S)
        else:
            store_given(gram_s, gamma_s, given, first, count, S)
        for n in gl.static_range(CHUNKS):
            out = from_slots(table_for(gamma_s, S), to_fp32(h_s[n].load(COLUMNS)), S)
            if S.SUB_NORM != "none":
                out *= for_tokens(weight[n], S)
            # These rows are done with: ask for those of the next tile.
            copy_chunk(h_s[n], stream, n, following, count, S)
            store_rows(x, rounded(out, dtype), n, fractions_of(first, S), fractions_of(count, S), S)
        async_copy.commit_group()
        first = following
    async_copy.wait_group(0)
