"""Backward of a width connection, or of a boundary, of slots so wide that few tokens fit into a tile.

Reads and writes of rows are those of `gluon.backward`, whose algebra these kernels share; slots are mixed by
`gluon.by_columns`. The sub-layer's output, which the second pass alone needs, is in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.by_columns import (
    again,
    by_columns,
    chunks,
    columns_of,
    each,
    for_tokens,
    for_turns,
    fractions_of,
    from_slots,
    in_token,
    load_all,
    of_slots,
    over_turns,
    per_row,
    projection_rows,
    rounded,
    rows_of,
    store_rows,
    table_for,
    to_fp32,
    weight_of,
)
from megatron_fc.connections.kernels.gluon.gradients import (
    coefficient_gradients,
    given_gradients,
    no_table_sums,
    store_table_sums,
)
from megatron_fc.connections.kernels.gluon.rows import copy_chunk, copy_values, keep_projection
from megatron_fc.connections.kernels.gluon.tables import beside, static_coefficients, total_of_warps, two_halves
from megatron_fc.connections.kernels.gluon.wide_sums import no_sums, over_rows, store_sums


@gluon.jit
def keep_weight(memory, norm, S: gl.constexpr):
    """The sub-layer norm's weight [CHUNKS, W, M, 64], once per program."""
    CHUNKS: gl.constexpr = S.CHUNKS
    for n in gl.static_range(CHUNKS):
        memory.index(n).store(weight_of(norm.weight, n, S))


@gluon.jit
def inputs_of(memory, weight, S: gl.constexpr):
    """Chunk of g_x, times the sub-layer norm's weight, as right operand [W, 64, columns] of a product over columns."""
    COLUMNS: gl.constexpr = max(8, memory.shape[1])
    L: gl.constexpr = layouts.right(S.W)
    rows = again(memory.permute([0, 2, 1]), 2, COLUMNS, L)
    if S.SUB_NORM != "none":
        factor = again(weight.permute([0, 2, 1]), 2, COLUMNS, L).to(gl.float32)
        factor = factor + 1.0 if S.ONE_PLUS else factor
        rows = (rows.to(gl.float32) * factor).to(memory.dtype)
    return rows


@gluon.jit
def products_of_rows(products, S: gl.constexpr):
    """Of rows of h with those of h [R, N], of u = g_x times the sub-layer norm's weight [R, M], and of g_mixed [R, N].

    products: the same by warp.
    """
    gram = total_of_warps(products[0].slice(0, S.R, dim=1), 0, S.N, S)
    with_u = total_of_warps(products[1].slice(0, S.R, dim=1), 0, S.M, S)
    return gram, with_u, total_of_warps(products[2].slice(0, S.R, dim=1), 0, S.N, S)


@gluon.jit
def table_gradients(z_s, products, d_beta_s, tables, fixed, sums, S: gl.constexpr):
    """All algebra between the passes: it leaves tables for the second one in memory. Returns the sums.

    products: of `products_of_rows`.
    """
    to_h_s, _, _, Z_s = tables
    gram, with_u, d_alpha = products
    z_s = z_s.slice(0, S.R, dim=1)
    found, sums = coefficient_gradients(z_s, gram, with_u, d_alpha, d_beta_s, fixed, sums, S)
    into_x, alpha, along, slope, dz, _ = found
    store_tables(tables, into_x, alpha, along, S)
    store_columns(to_h_s, beside(-slope, 1, S), S.N + S.M)
    store_columns(to_h_s, dz[1], 8)
    store_columns(to_h_s, dz[0], 8 + S.N)
    store_columns(to_h_s, dz[2], 8 + S.N + S.M)
    store_z(Z_s, dz[1], 0, S)
    store_z(Z_s, dz[0], S.N, S)
    store_z(Z_s, dz[2], S.N + S.M, S)
    return sums


@gluon.jit
def store_tables(tables, into_x, alpha, along, S: gl.constexpr):
    """What the second pass needs of any coefficients."""
    to_h_s, into_x_s, along_s, _ = tables
    into_x_s.reshape([S.R, S.M]).store(into_x)
    along_s.store(along)
    store_columns(to_h_s, alpha, 0)
    store_columns(to_h_s, into_x, S.N)


@gluon.jit
def store_columns(memory, values, FIRST: gl.constexpr):
    """Columns of a table as rows of [16, R]."""
    memory.slice(FIRST, values.shape[1], dim=0).permute([1, 0]).store(values)


@gluon.jit
def store_z(Z_s, values, FIRST: gl.constexpr, S: gl.constexpr):
    """Columns of the gradient of z in two halves, as right operand of a product over rows.

    Rows of a tile of 8 stand there twice, once for each half.
    """
    COUNT: gl.constexpr = values.shape[1]
    high, low = two_halves(values, Z_s.dtype)
    Z_s.slice(0, S.R, dim=0).slice(FIRST, COUNT, dim=1).store(high)
    Z_s.slice(S.R, S.R, dim=0).slice(FIRST, COUNT, dim=1).store(low)


@gluon.jit
def two_columns(rows, S: gl.constexpr):
    """The first and the second column of every lane, [W, R, 32] each."""
    return gl.split(gl.reshape(rows, [S.W, S.R, 32, 2]))


@gluon.jit
def add_products(total, a, b, S: gl.constexpr):
    """total [W, R, 32] + what a lane's two columns of a times b are in a row."""
    a, a_next = two_columns(a, S)
    b, b_next = two_columns(b, S)
    return total + a * b + a_next * b_next


@gluon.jit
def wide_backward_kernel(g_x, g_beta, g_mixed, h, pre, given, p, norm, g_h, partial, count, S: gl.constexpr):
    """As `megatron_fc.connections.kernels.width.width_backward_kernel`."""
    CHUNKS: gl.constexpr = S.CHUNKS
    T: gl.constexpr = S.R // S.N
    dtype: gl.constexpr = h.dtype.element_ty
    PRODUCTS: gl.constexpr = layouts.products(S.W)
    COLUMNS: gl.constexpr = layouts.columns(S.W, S.R)
    INPUTS: gl.constexpr = layouts.columns(S.W, T * S.M)
    ROWS: gl.constexpr = layouts.rows_in_memory()
    h_s, m_s, x_s = chunks(dtype, S.R, S), chunks(dtype, S.R, S), chunks(dtype, T * S.M, S)
    weight_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, S.M, S.K], layouts.plain(3))
    if given.gamma is None:
        w_s = gl.allocate_shared_memory(dtype, [CHUNKS, S.W, projection_rows(S), S.K], ROWS)
        d_beta_s = gl.allocate_shared_memory(gl.float32, [S.R], layouts.plain(1))
        z_s = gl.allocate_shared_memory(gl.float32, [S.W, 16, S.KP], layouts.plain(3))
    gram_s = gl.allocate_shared_memory(gl.float32, [S.W, 16, S.N], layouts.plain(3))
    with_u_s = gl.allocate_shared_memory(gl.float32, [S.W, 16, S.M], layouts.plain(3))
    with_mixed_s = gl.allocate_shared_memory(gl.float32, [S.W, 16, S.N], layouts.plain(3))
    into_x_s = gl.allocate_shared_memory(gl.float32, [T, S.N, S.M], layouts.plain(3))
    along_s = gl.allocate_shared_memory(gl.float32, [T, 1, 1], layouts.plain(3))
    # What rows are multiplied by to give the gradient of h: g_mixed, u, h itself; the projection.
    to_h_s = gl.allocate_shared_memory(gl.float32, [16, S.R], layouts.plain(2))
    Z_s = gl.allocate_shared_memory(dtype, [2 * S.R, S.KP], layouts.plain(2))
    if pre.o is not None:
        beta_s = gl.allocate_shared_memory(gl.float32, [S.R], layouts.plain(1))

    first = gl.program_id(0) * S.R
    if given.gamma is None:
        copy_values(d_beta_s, g_beta, first, count, S.R, S)
    for n in gl.static_range(CHUNKS):
        copy_chunk(h_s[n], h, n, first, count, S)
        copy_chunk(m_s[n], g_mixed, n, first, count, S)
        copy_chunk(x_s[n], g_x, n, fractions_of(first, S), fractions_of(count, S), S)
    async_copy.commit_group()
    if given.gamma is None:
        keep_projection(w_s, p, S)
    if S.SUB_NORM != "none":
        keep_weight(weight_s, norm, S)
    d_projection, d_weight = no_sums(S)
    if given.gamma is None:
        Z_s.store(gl.zeros([2 * S.R, S.KP], dtype, gl.BlockedLayout([1, 1], [8, 4], [S.W, 1], [1, 0])))
        fixed = static_coefficients(p, S)
        sums = no_table_sums(S)

    while first < count:
        following = first + gl.num_programs(0) * S.R
        async_copy.wait_group(0)
        z = gl.zeros([S.W, 16, S.KP], gl.float32, PRODUCTS)
        gram = gl.zeros([S.W, 16, S.R], gl.float32, PRODUCTS)
        with_mixed = gram
        with_u = gl.zeros([S.W, 16, max(8, T * S.M)], gl.float32, PRODUCTS)
        for n in gl.static_range(CHUNKS):
            rows = rows_of(h_s[n], S)
            if given.gamma is None:
                z = mma_v2(rows, columns_of(w_s.index(n), S), z)
            gram = mma_v2(rows, columns_of(h_s[n], S), gram)
            with_mixed = mma_v2(rows, columns_of(m_s[n], S), with_mixed)
            with_u = mma_v2(rows, inputs_of(x_s[n], weight_s.index(n), S), with_u)
        if given.gamma is None:
            z_s.store(z)
        gram_s.store(in_token(gram, S.R, S.N, S))
        with_mixed_s.store(in_token(with_mixed, S.R, S.N, S))
        with_u_s.store(in_token(with_u, T * S.M, S.M, S))
        if pre.o is not None:
            o = load_all(pre.o, fractions_of(first, S), fractions_of(count, S), T * S.M, S)
            copy_values(beta_s, pre.beta, first, count, S.R, S)
            async_copy.commit_group()
        products = products_of_rows((gram_s, with_u_s, with_mixed_s), S)
        tables = (to_h_s, into_x_s, along_s, Z_s)
        if given.gamma is None:
            sums = table_gradients(z_s, products, d_beta_s, tables, fixed, sums, S)
        else:
            into_x, alpha, along = given_gradients(products[0], products[1], products[2], given, first, count, S)
            store_tables(tables, into_x, alpha, along, S)
        if pre.o is not None:
            async_copy.wait_group(0)
            d_pre_beta, _ = two_columns(gl.zeros([S.W, S.R, S.K], gl.float32, COLUMNS), S)
        if given.gamma is None:
            copy_values(d_beta_s, g_beta, following, count, S.R, S)
        new_projection = ()
        new_weight = ()
        for n in gl.static_range(CHUNKS):
            rows = to_fp32(h_s[n].load(COLUMNS))
            u = to_fp32(x_s[n].load(INPUTS))
            if S.SUB_NORM != "none":
                normed = from_slots(table_for(into_x_s, S), rows, S)
                by_token = gl.reshape(u * normed, [S.W, T, S.M, S.K])
                new_weight = new_weight + (d_weight[n] + by_columns(gl.sum(by_token, axis=1), S),)
                weight = weight_s.index(n).load(layouts.columns(S.W, S.M))
                u = u * for_tokens(weight, S) - along_rows(along_s, S) * normed
            g = gl.zeros([S.W, T, S.N, S.K], gl.float32, layouts.mixing(S.W, [T, S.N]))
            mixed = each(to_fp32(m_s[n].load(COLUMNS)), S.N, S)
            for k in gl.static_range(S.N):
                g += of_slots(to_h_s, k, S) * mixed[k]
            u = each(u, S.M, S)
            for k in gl.static_range(S.M):
                g += of_slots(to_h_s, S.N + k, S) * u[k]
            if S.NORM == "rmsnorm":
                g += of_slots(to_h_s, S.N + S.M, S) * gl.convert_layout(gl.reshape(rows, g.shape), g.type.layout)
            if given.gamma is None:
                projection = each(
                    to_fp32(w_s.index(n).load(layouts.columns(S.W, projection_rows(S)))), projection_rows(S), S
                )
                for k in gl.static_range(1 + S.M + S.N):
                    g += of_slots(to_h_s, 8 + k, S) * projection[k]
            g = rounded(by_columns(g, S), dtype)
            store_rows(g_h, g, n, first, count, S)
            if pre.o is not None:
                g = to_fp32(g)
                d_pre_beta = add_products(d_pre_beta, g, for_turns(to_fp32(o[n]), S), S)
                g_o = over_turns(per_row(beta_s, S) * g, S)
                store_rows(pre.g_o, rounded(g_o, dtype), n, fractions_of(first, S), fractions_of(count, S), S)
            if given.gamma is None:
                new_projection = new_projection + (over_rows(h_s[n], Z_s, d_projection[n], S),)
            # These rows are done with: ask for those of the next tile.
            copy_chunk(h_s[n], h, n, following, count, S)
            copy_chunk(m_s[n], g_mixed, n, following, count, S)
            copy_chunk(x_s[n], g_x, n, fractions_of(following, S), fractions_of(count, S), S)
        async_copy.commit_group()
        if given.gamma is None:
            d_projection = new_projection
        if S.SUB_NORM != "none":
            d_weight = new_weight
        if pre.o is not None:
            d_before = gl.sum(gl.sum(d_pre_beta, axis=2), axis=0)
            at = first + gl.arange(0, S.R, layout=d_before.type.layout)
            gl.store(pre.g_beta + at, d_before, mask=at < count)
        first = following
    async_copy.wait_group(0)
    store_sums(partial, d_projection, d_weight, S)
    if given.gamma is None:
        store_table_sums(partial, sums, S)


@gluon.jit
def along_rows(memory, S: gl.constexpr):
    """A token's value [T, 1, 1] for its rows of u, [1, T * M, 1]."""
    T: gl.constexpr = S.R // S.N
    L: gl.constexpr = layouts.mixing(S.W, [T, S.M])
    values = memory.reshape([T]).load(gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    values = values[None, :, None, None].broadcast_to([S.W, T, S.M, S.K])
    return by_columns(values, S)
