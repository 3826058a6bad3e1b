"""Backward of a width connection, or of a boundary: every row is read once from memory and written once.

| | reads | writes | elements of d per token |
|---|---|---|---|
| width | g_x, g_mixed, h | g_h | 4 |
| boundary | g_x, g_mixed, h', o | gradient of h', g_o | 6 |

The tile is in shared memory, where tensor cores find it as it lies and transposed. Its first pass takes all products of
rows; then the algebra on coefficients; the second pass makes the results, and asks for each chunk of the next tile as
soon as this one's has been used. Sums for the projection and the sub-layer norm's weight stay in registers, the whole
launch long. Sums of the programs are in memory as `megatron_fc.connections.kernels.sums.reduce_kernel` takes them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.gradients import coefficient_gradients, no_table_sums, store_table_sums
from megatron_fc.connections.kernels.gluon.rows import (
    by_rows,
    copy_chunk,
    copy_values,
    halves_of,
    inside,
    keep_projection,
    make_finite,
    mix,
    places,
    row_of_projection,
    sub_norm_weight,
    weighted,
)
from megatron_fc.connections.kernels.gluon.tables import (
    beside,
    coefficient,
    from_tokens,
    in_token,
    is_finite,
    some_row,
    static_coefficients,
    store_columns,
    store_matrix,
    table_row,
    to_tokens,
    total_of_warps,
    with_transposed,
)


@gluon.jit
def over_tile(values, S: gl.constexpr):
    """[W, 16, 32] to [W, 8, 32]: a lane has rows r and r + 8, of the same fraction."""
    return gl.sum(gl.reshape(values, [S.W, 2, 8, 32]), axis=1)


@gluon.jit
def half_of(values, k: gl.constexpr, L: gl.constexpr):
    """Columns 32 k to 32 k + 31 of a chunk: registers get other names."""
    values = gl.permute(gl.reshape(values, [values.shape[0], values.shape[1], 2, 32]), [0, 1, 3, 2])
    first, second = gl.split(values)
    return gl.convert_layout(first if k == 0 else second, L)


@gluon.jit
def no_sums(S: gl.constexpr):
    """Of a program, by 32 columns: for the projection [W, KP, 32] and the sub-layer norm's weight [W, 8, 32]."""
    L: gl.constexpr = layouts.products(S.W)
    CHUNKS: gl.constexpr = S.CHUNKS
    projection = ()
    weight = ()
    for _ in gl.static_range(2 * CHUNKS):
        projection = projection + (gl.zeros([S.W, S.KP, 32], gl.float32, L),)
        weight = weight + (over_tile(gl.zeros([S.W, S.R, 32], gl.float32, L), S),)
    return projection, weight


@gluon.jit
def table_gradients(z_s, products_s, d_beta_s, matrices, flags_s, fixed, sums, S: gl.constexpr):
    """All algebra between the passes: it leaves matrices for the second one in memory. Returns the sums.

    products_s: products of rows of h with those of h, of u = g_x times the sub-layer norm's weight, and of g_mixed.
    """
    G_s, A_s, H_s, Z_s = matrices
    gram = total_of_warps(products_s.index(0), 0, S.N, S)
    with_u = total_of_warps(products_s.index(1), 0, S.M, S)
    d_alpha = total_of_warps(products_s.index(2), 0, S.N, S)
    found, sums = coefficient_gradients(z_s, gram, with_u, d_alpha, d_beta_s, fixed, sums, S)
    into_x, alpha, along, slope, dz, spoilt = found
    touched = gl.sum(gl.abs(with_u) + gl.abs(d_alpha), axis=1) + spoilt
    flags_s.store(gl.where(is_finite(touched), 0, 1))
    own = gl.zeros_like(alpha)
    if S.SUB_NORM == "rmsnorm":
        own = from_tokens(-along * with_transposed(to_tokens(into_x, S), S), S)
    if S.NORM == "rmsnorm":
        own -= gl.where(table_row(S.N, S) % S.N == coefficient(S.N, S), beside(slope, S.N, S), 0.0)
    store_matrix(G_s, into_x, S)
    store_matrix(A_s, alpha, S)
    store_matrix(H_s, own, S)
    store_columns(Z_s, dz[0], S.N, S.M)
    store_columns(Z_s, dz[1], 0, S.N)
    store_columns(Z_s, dz[2], S.M + S.N, 1)
    return sums


@gluon.jit
def store_sums(partial, d_projection, d_weight, S: gl.constexpr):
    """A program's sums for the projection and the sub-layer norm's weight."""
    CHUNKS: gl.constexpr = S.CHUNKS
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 4, 8], [S.W, 1, 1], [2, 1, 0])
    program = gl.program_id(0)
    k = gl.arange(0, S.KP, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    i = gl.arange(0, S.M, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    column = gl.arange(0, S.W, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None] * S.K
    column += gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    for n in gl.static_range(2 * CHUNKS):
        at = n // 2 * (S.W * S.K) + n % 2 * 32 + column
        row = program * (1 + S.M + S.N) + row_of_projection(k, S)
        mask = inside(k, n % 2 * 32 + column, n // 2, 1 + S.M + S.N, S)
        gl.store(partial.projection + row * S.C + at, gl.convert_layout(d_projection[n], L), mask=mask)
        if partial.weight is not None:
            total = gl.sum(gl.reshape(d_weight[n], [S.W, 8 // S.M, S.M, 32]), axis=1)
            mask = inside(i, n % 2 * 32 + column, n // 2, S.M, S)
            gl.store(partial.weight + (program * S.M + i) * S.C + at, gl.convert_layout(total, L), mask=mask)


@gluon.jit
def main_backward_kernel(g_x, g_beta, g_mixed, h, pre, given, p, norm, g_h, partial, count, S: gl.constexpr):
    """As `megatron_fc.connections.kernels.width.width_backward_kernel`."""
    CHUNKS: gl.constexpr = S.CHUNKS
    dtype: gl.constexpr = h.dtype.element_ty
    PRODUCTS: gl.constexpr = layouts.products(S.W)
    LEFT: gl.constexpr = layouts.left(S.W)
    RIGHT: gl.constexpr = layouts.right(S.W)
    OUT: gl.constexpr = layouts.quads(S.W)
    ROWS: gl.constexpr = layouts.rows_in_memory()
    MATRIX: gl.constexpr = layouts.matrix_in_memory()
    TILE: gl.constexpr = [CHUNKS, S.W, S.R, S.K]
    h_s = gl.allocate_shared_memory(dtype, TILE, ROWS)
    x_s = gl.allocate_shared_memory(dtype, TILE, ROWS)
    m_s = gl.allocate_shared_memory(dtype, TILE, ROWS)
    u_s = x_s
    if S.SUB_NORM != "none":
        u_s = gl.allocate_shared_memory(dtype, TILE, ROWS)
    d_beta_s = gl.allocate_shared_memory(gl.float32, [S.R], layouts.plain(1))
    flags_s = gl.allocate_shared_memory(gl.int32, [S.R], layouts.plain(1))
    if pre.o is not None:
        o_s = gl.allocate_shared_memory(dtype, TILE, ROWS)
        beta_s = gl.allocate_shared_memory(gl.float32, [S.R], layouts.plain(1))
    w_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, S.KP, S.K], ROWS)
    z_s = gl.allocate_shared_memory(gl.float32, [S.W, S.R, S.KP], layouts.plain(3))
    products_s = gl.allocate_shared_memory(gl.float32, [3, S.W, S.R, S.M], layouts.plain(3))
    # Coefficients of x and of the mixed residual, what h itself is multiplied by, and the gradient of z.
    G_s = gl.allocate_shared_memory(dtype, [2, S.R, S.R], MATRIX)
    A_s = gl.allocate_shared_memory(dtype, [2, S.R, S.R], MATRIX)
    H_s = gl.allocate_shared_memory(dtype, [2, S.R, S.R], MATRIX)
    Z_s = gl.allocate_shared_memory(dtype, [2, S.R, S.KP], MATRIX)

    keep_projection(w_s, p, S)
    for half in gl.static_range(2):
        Z_s.index(half).store(gl.zeros([S.R, S.KP], dtype, gl.BlockedLayout([1, 1], [2, 16], [S.W, 1], [1, 0])))
    norm_weight = ()
    if S.SUB_NORM != "none":
        for n in gl.static_range(CHUNKS):
            norm_weight = norm_weight + (sub_norm_weight(norm, n, LEFT, S),)
    fixed = static_coefficients(p, S)
    d_projection, d_weight = no_sums(S)
    sums = no_table_sums(S)
    out_row, out_column = places(S.R, OUT, S)

    tile = gl.program_id(0)
    copy_values(d_beta_s, g_beta, tile * S.R, count, S.R, S)
    for n in gl.static_range(CHUNKS):
        copy_chunk(h_s.index(n), h, n, tile * S.R, count, S)
        copy_chunk(x_s.index(n), g_x, n, tile * S.R, count, S)
        copy_chunk(m_s.index(n), g_mixed, n, tile * S.R, count, S)
    async_copy.commit_group()
    while tile * S.R < count:
        first = tile * S.R
        async_copy.wait_group(0)
        z = gl.zeros([S.W, S.R, S.KP], gl.float32, PRODUCTS)
        gram = gl.zeros([S.W, S.R, S.R], gl.float32, PRODUCTS)
        with_u, with_mixed = gram, gram
        for n in gl.static_range(CHUNKS):
            rows, u = h_s.index(n).load(LEFT), x_s.index(n).load(LEFT)
            if S.SUB_NORM != "none":
                u = weighted(u, norm_weight[n], S)
                u_s.index(n).store(u)
            z = mma_v2(rows, w_s.index(n).permute([0, 2, 1]).load(RIGHT), z)
            gram = by_rows(rows, rows, gram, S)
            with_mixed = mma_v2(rows, m_s.index(n).permute([0, 2, 1]).load(RIGHT), with_mixed)
            with_u = by_rows(rows, u, with_u, S)
        z_s.store(z)
        products_s.index(0).store(in_token(gram, S))
        products_s.index(1).store(in_token(with_u, S))
        products_s.index(2).store(in_token(with_mixed, S))
        if pre.o is not None:
            copy_values(beta_s, pre.beta, first, count, S.R, S)
            for n in gl.static_range(CHUNKS):
                copy_chunk(o_s.index(n), pre.o, n, first, count, S)
            async_copy.commit_group()

        sums = table_gradients(z_s, products_s, d_beta_s, (G_s, A_s, H_s, Z_s), flags_s, fixed, sums, S)
        for n in range(0, some_row(flags_s, S) * CHUNKS):
            make_finite(h_s, n, S)
            make_finite(u_s, n, S)
            make_finite(m_s, n, S)

        if pre.o is not None:
            d_pre_beta = gl.zeros([S.W, S.R], gl.float32, gl.SliceLayout(2, OUT))
        following = (tile + gl.num_programs(0)) * S.R
        copy_values(d_beta_s, g_beta, following, count, S.R, S)
        new_projection = ()
        new_weight = ()
        for n in gl.static_range(CHUNKS):
            rows = h_s.index(n).load(RIGHT)
            into_x, into_x_low = halves_of(G_s, True, S)
            into_z, into_z_low = halves_of(Z_s, True, S)
            if S.SUB_NORM != "none":
                g_x_rows = x_s.index(n).load(PRODUCTS)
            for k in gl.static_range(2):
                part = half_of(rows, k, RIGHT)
                if S.SUB_NORM != "none":
                    nothing = gl.zeros([S.W, S.R, 32], gl.float32, PRODUCTS)
                    normed = mma_v2(into_x_low, part, mma_v2(into_x, part, nothing))
                    normed *= half_of(g_x_rows, k, PRODUCTS).to(gl.float32)
                    new_weight = new_weight + (d_weight[2 * n + k] + over_tile(normed, S),)
                total = mma_v2(into_z, part, d_projection[2 * n + k])
                new_projection = new_projection + (mma_v2(into_z_low, part, total),)
            g = mix(H_s, rows, gl.zeros([S.W, S.R, S.K], gl.float32, PRODUCTS), False, S)
            g = mix(G_s, u_s.index(n).load(RIGHT), g, False, S)
            g = mix(A_s, m_s.index(n).load(RIGHT), g, False, S)
            # These rows are done with: ask for those of the next tile.
            copy_chunk(h_s.index(n), h, n, following, count, S)
            copy_chunk(x_s.index(n), g_x, n, following, count, S)
            copy_chunk(m_s.index(n), g_mixed, n, following, count, S)
            if n == CHUNKS - 1:
                async_copy.commit_group()
            g = gl.convert_layout(mix(Z_s, w_s.index(n).load(RIGHT), g, False, S).to(dtype), OUT)
            mask = inside(out_row, out_column, n, count - first, S)
            at = first.to(gl.int64) * S.C + (out_row * S.C + out_column + n * (S.W * S.K))
            gl.store(g_h + at, g, mask=mask)
            if pre.o is not None:
                if n == 0:
                    async_copy.wait_group(1 if CHUNKS == 1 else 0)
                    beta = beta_s.load(gl.SliceLayout(0, gl.SliceLayout(2, OUT)))[None, :, None]
                g = g.to(gl.float32)
                d_pre_beta += gl.sum(g * o_s.index(n).load(OUT).to(gl.float32), axis=2)
                gl.store(pre.g_o + at, (beta * g).to(dtype), mask=mask)
        d_projection = new_projection
        if S.SUB_NORM != "none":
            d_weight = new_weight
        tile += gl.num_programs(0)
        if pre.o is not None:
            d_pre_beta = gl.sum(d_pre_beta, axis=0)
            at = first + gl.arange(0, S.R, layout=d_pre_beta.type.layout)
            gl.store(pre.g_beta + at, d_pre_beta, mask=at < count)
    async_copy.wait_group(0)
    store_sums(partial, d_projection, d_weight, S)
    store_table_sums(partial, sums, S)
