"""Width connection: x = norm(Y(h)^T h), and with it the coefficients beta and alpha for the depth connection.

| | reads | writes | elements of d per token |
|---|---|---|---|
| forward | h | x | 2 |
| backward | g_x, g_mixed, h | g_h | 4 |
| boundary, forward | o, h of the depth connection before | its h', x | 4 |
| boundary, backward | g_x, g_mixed, h', o | gradient of h', g_o | 6 |

Per token there are also, in fp32, beta (m values) and alpha (m*m) in forward and the gradient of beta (m) in backward.
Parameters are read once per program; their gradients are written once per program, as partial sums.

Two passes over a tile: the first takes all inner products of rows, the second makes the result. Between them everything
is algebra on tables: the statistics of x follow from the products of the rows of h, so that x need not exist for them.
"""

import triton
import triton.language as tl

from megatron_fc.kernels.depth import alpha_matrix, beta_rows, depth_chunk, depth_gradient_chunk
from megatron_fc.kernels.tiles import (
    from_table,
    load_chunk,
    load_projection,
    load_weight,
    moments,
    offsets,
    rows_by_rows,
    same_token,
    scales,
    static_table,
    store_chunk,
    table_by_rows,
    tanh,
    to_table,
    token_sum,
)


@triton.jit
def load_weights(p, norm, like, S: tl.constexpr):
    """All chunks of the projection and of the sub-layer norm's weight and bias; empty where they are read per tile."""
    CHUNKS: tl.constexpr = S.CHUNKS
    projection, weight, bias = (), (), ()
    if S.KEEP_WEIGHTS:
        for n in tl.static_range(CHUNKS):
            if S.DYNAMIC:
                projection = projection + (load_projection(p, n, like, S),)
            if S.SUB_NORM != "none":
                weight = weight + (load_weight(norm.weight, n, S),)
            if norm.bias is not None:
                bias = bias + (load_weight(norm.bias, n, S),)
    return projection, weight, bias


@triton.jit
def projection_chunk(kept, p, n: tl.constexpr, like, S: tl.constexpr):
    return kept[n] if S.KEEP_WEIGHTS else load_projection(p, n, like, S)


@triton.jit
def weight_chunk(kept, pointer, n: tl.constexpr, S: tl.constexpr):
    weight = kept[n] if S.KEEP_WEIGHTS else load_weight(pointer, n, S)
    return weight + 1.0 if S.ONE_PLUS else weight


@triton.jit
def projection_sums(p, projection, like, S: tl.constexpr):
    """Sum of the columns of each row of the projection, [KP], which a fraction's mean is multiplied by."""
    CHUNKS: tl.constexpr = S.CHUNKS
    total = tl.zeros([S.KP], tl.float32)
    if S.NORM == "layernorm":
        for n in tl.static_range(CHUNKS):
            total += tl.sum(projection_chunk(projection, p, n, like, S).to(tl.float32), axis=1)
    return total


@triton.jit
def add_products(products, h, p, projection, n: tl.constexpr, like, S: tl.constexpr):
    """Add chunk n of h to the products that a width connection needs: with W, with itself, sums and squares of rows."""
    z, gram, sums, squares = products
    wide = h.to(tl.float32)
    if S.DYNAMIC:
        z = rows_by_rows(h, projection_chunk(projection, p, n, like, S), z, S)
    if S.SUB_NORM != "none":
        gram = rows_by_rows(h, h, gram, S)
    return z, gram, sums + tl.sum(wide, axis=1), squares + tl.sum(wide * wide, axis=1)


@triton.jit
def no_products(S: tl.constexpr):
    row = tl.zeros([S.R], tl.float32)
    return tl.zeros([S.R, S.KP], tl.float32), tl.zeros([S.R, S.R], tl.float32), row, row


@triton.jit
def coefficients(products, static, scale, sums, S: tl.constexpr):
    """Coefficients, z and tanh(z) as tables, mean and reciprocal deviation of each row (eq. 9-14)."""
    z, _, row_sums, squares = products
    mean, deviation = moments(row_sums, squares, S.NORM, S.EPS, S.C)
    z = deviation[:, None] * (z - mean[:, None] * sums[None, :])
    t = tanh(z) if S.TANH else z
    table = static
    if S.DYNAMIC:
        table += scale[None, :] * t
    return table, z, t, mean, deviation


@triton.jit
def input_moments(gamma, products, S: tl.constexpr):
    """Mean and reciprocal deviation of x = gamma^T h over each token's row, and the products (h_i, x_j)."""
    _, gram, row_sums, _ = products
    gram_gamma = tl.dot(tl.where(same_token(S), gram, 0.0), gamma, input_precision="tf32x3")
    squares = token_sum(tl.sum(gamma * gram_gamma, axis=1), S)
    sums = token_sum(tl.sum(gamma, axis=1) * row_sums, S)
    mean, deviation = moments(sums, squares, S.SUB_NORM, S.SUB_EPS, S.M * S.C)
    return mean, deviation, gram_gamma


@triton.jit
def store_coefficients(table, beta, alpha, first, count, S: tl.constexpr):
    rows = first + tl.arange(0, S.R)
    k = tl.arange(0, S.KP)[None, :]
    valid = rows < count
    tl.store(beta + rows, tl.sum(tl.where(k == 0, table, 0.0), axis=1), mask=valid)
    inside = (k > S.M) & (k < 1 + 2 * S.M)
    tl.store(alpha + rows[:, None] * S.M + (k - 1 - S.M), table, mask=valid[:, None] & inside)


@triton.jit
def finish_width(
    kept, x, products, beta, alpha, p, norm, projection, weight, bias, static, scale, sums, first, count,
    S: tl.constexpr,
):  # fmt: skip
    """Second pass: store the coefficients, and x or norm(x) from the chunks of h that the first pass kept."""
    CHUNKS: tl.constexpr = S.CHUNKS
    table, _, _, _, _ = coefficients(products, static, scale, sums, S)
    store_coefficients(table, beta, alpha, first, count, S)
    if x is not None:
        gamma = from_table(table, 1, S)
        if S.SUB_NORM != "none":
            mean, deviation, _ = input_moments(gamma, products, S)
        for n in tl.static_range(CHUNKS):
            out = table_by_rows(tl.trans(gamma), kept[n], S)
            if S.SUB_NORM != "none":
                out = (out - mean[:, None]) * deviation[:, None] * weight_chunk(weight, norm.weight, n, S)
                if norm.bias is not None:
                    out += bias[n] if S.KEEP_WEIGHTS else load_weight(norm.bias, n, S)
            store_chunk(x, out, first, count, n, S)


@triton.jit
def width_forward_kernel(h, pre, p, norm, x, beta, alpha, count, S: tl.constexpr):
    """count: rows of h, that is tokens times M. With `pre.o`, h is made and stored by the depth connection before."""
    CHUNKS: tl.constexpr = S.CHUNKS
    projection, weight, bias = load_weights(p, norm, h, S)
    sums = projection_sums(p, projection, h, S)
    static, scale = static_table(p, S), scales(p, S)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, S.R), tl.num_programs(0)):
        first = tile * S.R
        products = no_products(S)
        kept = ()
        if pre.o is not None:
            pre_beta, pre_alpha = beta_rows(pre.beta, first, count, S), alpha_matrix(pre.alpha, first, count, S)
        for n in tl.static_range(CHUNKS):
            if pre.o is not None:
                chunk = depth_chunk(pre, pre_beta, pre_alpha, first, count, n, h, S)
                store_chunk(h, chunk, first, count, n, S)
            else:
                chunk = load_chunk(h, first, count, n, S)
            products = add_products(products, chunk, p, projection, n, h, S)
            kept = kept + (chunk,)
        finish_width(
            kept, x, products, beta, alpha, p, norm, projection, weight, bias, static, scale, sums, first, count, S
        )


@triton.jit
def zero_sums(norm, S: tl.constexpr):
    """A program's sums for the parameters' gradients: chunks of projection, norm weight and bias, and three tables."""
    CHUNKS: tl.constexpr = S.CHUNKS
    projection, weight, bias = (), (), ()
    for _ in tl.static_range(CHUNKS):
        if S.DYNAMIC:
            projection = projection + (tl.zeros([S.KP, S.BC], tl.float32),)
        if S.SUB_NORM != "none":
            weight = weight + (tl.zeros([S.M, S.BC], tl.float32),)
        if norm.bias is not None:
            bias = bias + (tl.zeros([S.M, S.BC], tl.float32),)
    table = tl.zeros([S.R, S.KP], tl.float32)
    return projection, weight, bias, (table, table, table)


@triton.jit
def over_tokens(values, S: tl.constexpr):
    """Sum of [R, BC] over the tokens of a tile, [M, BC]."""
    return tl.sum(tl.reshape(values, [S.R // S.M, S.M, S.BC]), axis=0)


@triton.jit
def input_gradient_products(gamma, with_x, u_sums, products, S: tl.constexpr):
    """Backward of the sub-layer's norm between the passes: its statistics, and the products (h_i, g_x_j)."""
    mean, deviation, gram_gamma = input_moments(gamma, products, S)
    h_sums = products[2]
    u_total = token_sum(u_sums, S)
    along = deviation * (token_sum(tl.sum(gamma * with_x, axis=1), S) - mean * u_total) / (S.M * S.C)
    total = u_total / (S.M * S.C) if S.SUB_NORM == "layernorm" else tl.zeros_like(mean)
    with_normed = deviation[:, None] * (gram_gamma - (mean * h_sums)[:, None])
    with_g = deviation[:, None] * (with_x - (total * h_sums)[:, None] - along[:, None] * with_normed)
    return tl.where(same_token(S), with_g, 0.0), (mean, deviation, along, total)


@triton.jit
def width_backward_kernel(g_x, g_beta, g_mixed, g_other, h, pre, p, norm, g_h, partial, count, S: tl.constexpr):
    """count: rows of h, that is tokens times M. Absent gradients are None.

    g_other is added to the gradient of h. With `pre.o`, it goes on through the depth connection that made h.
    """
    CHUNKS: tl.constexpr = S.CHUNKS
    weights = load_weights(p, norm, h, S)
    projection, weight = weights[0], weights[1]
    sums = projection_sums(p, projection, h, S)
    static, scale = static_table(p, S), scales(p, S)
    d_projection, d_weight, d_bias, tables = zero_sums(norm, S)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, S.R), tl.num_programs(0)):
        first = tile * S.R
        products = no_products(S)
        with_x, u_sums = products[1], products[2]
        with_mixed = with_x
        kept_h, kept_x, kept_mixed = (), (), ()
        for n in tl.static_range(CHUNKS):
            chunk = load_chunk(h, first, count, n, S)
            products = add_products(products, chunk, p, projection, n, h, S)
            if S.KEEP_ROWS:
                kept_h = kept_h + (chunk,)
            if g_x is not None:
                u = load_chunk(g_x, first, count, n, S)
                if S.KEEP_ROWS:
                    kept_x = kept_x + (u,)
                if S.SUB_NORM != "none":
                    u = (u * weight_chunk(weight, norm.weight, n, S)).to(chunk.dtype)
                    u_sums += tl.sum(u.to(tl.float32), axis=1)
                with_x = rows_by_rows(chunk, u, with_x, S)
            if g_mixed is not None:
                g = load_chunk(g_mixed, first, count, n, S)
                if S.KEEP_ROWS:
                    kept_mixed = kept_mixed + (g,)
                with_mixed = rows_by_rows(chunk, g, with_mixed, S)

        table, z, t, mean, deviation = coefficients(products, static, scale, sums, S)
        gamma, alpha = from_table(table, 1, S), from_table(table, 1 + S.M, S)
        with_x = tl.where(same_token(S), with_x, 0.0)
        if S.SUB_NORM != "none":
            with_x, sub = input_gradient_products(gamma, with_x, u_sums, products, S)
        d = to_table(with_x, 1, S) + to_table(with_mixed, 1 + S.M, S)
        if g_beta is not None:
            at = first + tl.arange(0, S.R)
            d_beta = tl.load(g_beta + at, mask=at < count, other=0.0)
            d += tl.where((tl.arange(0, S.KP) == 0)[None, :], d_beta[:, None], 0.0)
        dz = d * scale[None, :]
        if S.TANH:
            dz *= 1.0 - t * t
        fraction_along = tl.sum(dz * z, axis=1) / S.C
        fraction_total = tl.sum(dz * sums[None, :], axis=1) / S.C
        dz *= deviation[:, None]
        tables = (tables[0] + d, tables[1] + d * t, tables[2] + dz * mean[:, None])

        new_projection, new_weight, new_bias = (), (), ()
        if pre.o is not None:
            pre_beta, d_pre_beta = beta_rows(pre.beta, first, count, S), tl.zeros([S.R], tl.float32)
        for n in tl.static_range(CHUNKS):
            chunk = kept_h[n] if S.KEEP_ROWS else load_chunk(h, first, count, n, S)
            g = tl.zeros([S.R, S.BC], tl.float32)
            if g_x is not None:
                u = kept_x[n] if S.KEEP_ROWS else load_chunk(g_x, first, count, n, S)
                if S.SUB_NORM != "none":
                    normed = (table_by_rows(tl.trans(gamma), chunk, S) - sub[0][:, None]) * sub[1][:, None]
                    new_weight = new_weight + (d_weight[n] + over_tokens(u * normed, S),)
                    if norm.bias is not None:
                        new_bias = new_bias + (d_bias[n] + over_tokens(u.to(tl.float32), S),)
                    u = u * weight_chunk(weight, norm.weight, n, S) - sub[3][:, None] - normed * sub[2][:, None]
                    u = (u * sub[1][:, None]).to(chunk.dtype)
                g += table_by_rows(gamma, u, S)
            if g_mixed is not None:
                g += table_by_rows(alpha, kept_mixed[n] if S.KEEP_ROWS else load_chunk(g_mixed, first, count, n, S), S)
            if S.DYNAMIC:
                w = projection_chunk(projection, p, n, h, S)
                g += table_by_rows(dz, w, S)
                if S.NORM != "none":
                    slope = deviation * deviation * fraction_along
                    g -= slope[:, None] * (chunk.to(tl.float32) - mean[:, None]) + (deviation * fraction_total)[:, None]
                new_projection = new_projection + (d_projection[n] + table_by_rows(tl.trans(dz), chunk, S),)
            if g_other is not None:
                g += load_chunk(g_other, first, count, n, S).to(tl.float32)
            store_chunk(g_h, g, first, count, n, S)
            if pre.o is not None:
                rounded = g.to(g_h.dtype.element_ty)
                d_pre_beta += depth_gradient_chunk(rounded, pre, pre_beta, first, count, n, h, S)
        if pre.o is not None:
            at = first + tl.arange(0, S.R)
            tl.store(pre.g_beta + at, d_pre_beta, mask=at < count)
        if S.DYNAMIC:
            d_projection = new_projection
        if S.SUB_NORM != "none":
            d_weight = new_weight
            if norm.bias is not None:
                d_bias = new_bias
    store_sums(d_projection, d_weight, d_bias, tables, partial, S)


@triton.jit
def store_sums(d_projection, d_weight, d_bias, tables, partial, S: tl.constexpr):
    """Write this program's sums to its place in `partial`."""
    CHUNKS: tl.constexpr = S.CHUNKS
    program = tl.program_id(0)
    k, i, r = tl.arange(0, S.KP), tl.arange(0, S.M), tl.arange(0, S.R)
    rows: tl.constexpr = 2 * S.M + 1
    for n in tl.static_range(CHUNKS):
        if S.DYNAMIC:
            at, inside = offsets(program * rows + k, n, S)
            tl.store(partial.projection + at, d_projection[n], mask=(k < rows)[:, None] & inside[None, :])
        if S.SUB_NORM != "none":
            at, inside = offsets(program * S.M + i, n, S)
            tl.store(partial.weight + at, d_weight[n], mask=inside[None, :])
            if partial.bias is not None:
                tl.store(partial.bias + at, d_bias[n], mask=inside[None, :])
    for n in tl.static_range(3):
        at = ((program * 3 + n) * S.R + r)[:, None] * S.KP + k[None, :]
        tl.store(partial.tables + at, tables[n])
