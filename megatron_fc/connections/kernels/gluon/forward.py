"""Width connection and the sub-layer's norm, or a boundary: every row is read once from memory and written once.

| | reads | writes | elements of d per token |
|---|---|---|---|
| width | h | x | 2 |
| boundary | o, h of the depth connection before | its h', x | 4 |

The tile is in shared memory. Its first pass makes h', if there is a depth connection, and takes all products of rows;
then comes the algebra on coefficients; the second pass makes x, and asks for each chunk of the next tile as soon as
this one's has been used.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.rows import (
    by_rows,
    copy_chunk,
    copy_values,
    inside,
    keep_projection,
    make_finite,
    mix,
    places,
    sub_norm_weight,
    weighted,
)
from megatron_fc.connections.kernels.gluon.tables import (
    beside,
    bounded,
    from_tokens,
    in_token,
    input_deviation,
    is_finite,
    predictions,
    some_row,
    static_coefficients,
    store_matrix,
    store_table,
    to_tokens,
    total_of_warps,
)


@gluon.jit
def copy_before(o_s, beta_s, alpha_s, pre, n: gl.constexpr, first, count, S: gl.constexpr):
    """Ask for chunk n of the sub-layer's output, and with the last one for the coefficients of the depth connection."""
    copy_chunk(o_s.index(n), pre.o, n, first, count, S)
    if n == S.CHUNKS - 1:
        copy_values(beta_s, pre.beta, first, count, S.R, S)
        copy_values(alpha_s, pre.alpha, first * S.M, count * S.M, S.R * S.M, S)


@gluon.jit
def store_alpha(memory, alpha_s, flags_s, h_s, S: gl.constexpr):
    """alpha of the depth connection as a matrix in memory. It is not finite where its token of h is not."""
    CHUNKS: gl.constexpr = S.CHUNKS
    alpha = alpha_s.reshape([S.R, S.N]).load(layouts.table(S.N, S.W, S.R, S.N))
    store_matrix(memory, alpha, S)
    flags_s.store(gl.where(is_finite(gl.sum(gl.abs(alpha), axis=1)), 0, 1))
    for n in range(0, some_row(flags_s, S) * CHUNKS):
        make_finite(h_s, n, S)


@gluon.jit
def store_coefficients(z_s, gram_s, G_s, flags_s, fixed, beta, alpha, first, count, S: gl.constexpr):
    """All algebra between the passes: coefficients for the depth connection, and those of x as a matrix in memory."""
    s_gamma, s_alpha, s_beta, scale_alpha, scale_beta = fixed
    gram = total_of_warps(gram_s, 0, S.N, S)
    z_gamma, z_alpha, z_beta, _, spoilt = predictions(z_s, gram, S)
    flags_s.store(gl.where(is_finite(spoilt), 0, 1))
    store_table(alpha, s_alpha + scale_alpha * bounded(z_alpha, S) + beside(spoilt, S.N, S), first, count, S)
    store_table(beta, s_beta + scale_beta * bounded(z_beta, S) + beside(spoilt, 1, S), first, count, S)
    gamma = s_gamma + scale_alpha * bounded(z_gamma, S) + beside(spoilt, S.M, S)
    if S.SUB_NORM == "rmsnorm":
        gamma3 = to_tokens(gamma, S)
        deviation, _ = input_deviation(gamma3, to_tokens(gram, S), S)
        gamma = from_tokens(deviation * gamma3, S)
    store_matrix(G_s, gamma, S)


@gluon.jit
def main_forward_kernel(h, pre, given, p, norm, x, beta, alpha, count, S: gl.constexpr):
    """As `megatron_fc.connections.kernels.width.width_forward_kernel`."""
    CHUNKS: gl.constexpr = S.CHUNKS
    dtype: gl.constexpr = h.dtype.element_ty
    PRODUCTS: gl.constexpr = layouts.products(S.W)
    LEFT: gl.constexpr = layouts.left(S.W)
    RIGHT: gl.constexpr = layouts.right(S.W)
    OUT: gl.constexpr = layouts.quads(S.W)
    ROWS: gl.constexpr = layouts.rows_in_memory()
    MATRIX: gl.constexpr = layouts.matrix_in_memory()
    h_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, S.R, S.K], ROWS)
    w_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, S.KP, S.K], ROWS)
    z_s = gl.allocate_shared_memory(gl.float32, [S.W, S.R, S.KP], layouts.plain(3))
    gram_s = gl.allocate_shared_memory(gl.float32, [S.W, S.R, S.M], layouts.plain(3))
    G_s = gl.allocate_shared_memory(dtype, [2, S.R, S.R], MATRIX)
    flags_s = gl.allocate_shared_memory(gl.int32, [S.R], layouts.plain(1))
    stream = h
    if pre.o is not None:
        stream = pre.h
        o_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, S.R, S.K], ROWS)
        beta_s = gl.allocate_shared_memory(gl.float32, [S.R], layouts.plain(1))
        alpha_s = gl.allocate_shared_memory(gl.float32, [S.R * S.M], layouts.plain(1))
        A_s = gl.allocate_shared_memory(dtype, [2, S.R, S.R], MATRIX)

    keep_projection(w_s, p, S)
    norm_weight = ()
    if S.SUB_NORM != "none":
        for n in gl.static_range(CHUNKS):
            norm_weight = norm_weight + (sub_norm_weight(norm, n, PRODUCTS, S),)
    fixed = static_coefficients(p, S)
    out_row, out_column = places(S.R, OUT, S)

    tile = gl.program_id(0)
    for n in gl.static_range(CHUNKS):
        copy_chunk(h_s.index(n), stream, n, tile * S.R, count, S)
        if pre.o is not None:
            copy_before(o_s, beta_s, alpha_s, pre, n, tile * S.R, count, S)
    async_copy.commit_group()
    while tile * S.R < count:
        first = tile * S.R
        following = (tile + gl.num_programs(0)) * S.R
        start = first.to(gl.int64) * S.C
        async_copy.wait_group(0)
        z = gl.zeros([S.W, S.R, S.KP], gl.float32, PRODUCTS)
        gram = gl.zeros([S.W, S.R, S.R], gl.float32, PRODUCTS)
        if pre.o is not None:
            store_alpha(A_s, alpha_s, flags_s, h_s, S)
            before = beta_s.load(gl.SliceLayout(0, gl.SliceLayout(2, PRODUCTS)))[None, :, None]
        for n in gl.static_range(CHUNKS):
            if pre.o is not None:
                nothing = gl.zeros([S.W, S.R, S.K], gl.float32, PRODUCTS)
                mixed = mix(A_s, h_s.index(n).load(RIGHT), nothing, True, S)
                made = (mixed + before * o_s.index(n).load(PRODUCTS).to(gl.float32)).to(dtype)
                copy_before(o_s, beta_s, alpha_s, pre, n, following, count, S)
                mask = inside(out_row, out_column, n, count - first, S)
                at = start + (out_row * S.C + out_column + n * (S.W * S.K))
                gl.store(h + at, gl.convert_layout(made, OUT), mask=mask)
                h_s.index(n).store(made)
                rows = gl.convert_layout(made, LEFT)
            else:
                rows = h_s.index(n).load(LEFT)
            z = mma_v2(rows, w_s.index(n).permute([0, 2, 1]).load(RIGHT), z)
            gram = by_rows(rows, rows, gram, S)
        z_s.store(z)
        gram_s.store(in_token(gram, S))
        store_coefficients(z_s, gram_s, G_s, flags_s, fixed, beta, alpha, first, count, S)
        for n in range(0, some_row(flags_s, S) * CHUNKS):
            make_finite(h_s, n, S)
        for n in gl.static_range(CHUNKS):
            nothing = gl.zeros([S.W, S.R, S.K], gl.float32, PRODUCTS)
            out = mix(G_s, h_s.index(n).load(RIGHT), nothing, True, S)
            if S.SUB_NORM != "none":
                out = weighted(out, norm_weight[n], S)
            # These rows are done with: ask for those of the next tile.
            copy_chunk(h_s.index(n), stream, n, following, count, S)
            mask = inside(out_row, out_column, n, count - first, S)
            at = start + (out_row * S.C + out_column + n * (S.W * S.K))
            gl.store(x + at, gl.convert_layout(gl.convert_layout(out, PRODUCTS).to(dtype), OUT), mask=mask)
        async_copy.commit_group()
        tile += gl.num_programs(0)
    async_copy.wait_group(0)
