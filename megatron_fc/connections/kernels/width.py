"""Width connection: x = norm(Y(h)^T h), and with it the coefficients beta and alpha for the depth connection.

| | reads | writes | elements of d per token | r = n/m = 1 |
|---|---|---|---|---|
| forward | h | x | r + 1 | 2 |
| backward | g_x, g_mixed, h | g_h | 3r + 1 | 4 |
| boundary, forward | o, h of the depth connection before | its h', x | 2r + 2 | 4 |
| boundary, backward | g_x, g_mixed, h', o | gradient of h', g_o | 3r + 3 | 6 |

Per token there are also, in fp32, beta (n values) and alpha (n*n) in forward and the gradient of beta (n) in backward.
Coefficients that are `Given` are read and not predicted: gamma (n*m), in backward also alpha and the gradients of both.
Parameters are read and sums for their gradients written once per program; from tile to tile both stay in cache.

Two passes over a tile: the first takes all inner products of rows, the second, which finds the rows in cache, makes the
result. It goes backwards: of a tile that does not fit, what was read last is still there. Between them everything is
algebra on tables: the statistics of x follow from the products of the rows of h, so that x need not exist for them.
"""

import triton
import triton.language as tl

from megatron_fc.connections.kernels.depth import alpha_matrix, beta_rows, depth_chunk, depth_gradient_chunk
from megatron_fc.connections.kernels.sums import add_projection, add_weight, store_table_sums
from megatron_fc.connections.kernels.tables import (
    from_table,
    given_table,
    scales,
    static_table,
    store_coefficients,
    store_given_gradients,
    tanh,
    to_table,
)
from megatron_fc.connections.kernels.tiles import (
    ask,
    diagonal,
    gathered,
    less,
    load_chunk,
    load_projection,
    load_weight,
    mix,
    moments,
    row_sum,
    rows_by_rows,
    same_token,
    spoiled,
    store_chunk,
    table_by_rows,
    token_sum,
)


@triton.jit
def weight_chunk(norm, n, S: tl.constexpr):
    """Chunk n of what the sub-layer's norm multiplies by."""
    weight = load_weight(norm.weight, n, S)
    return weight + 1.0 if S.ONE_PLUS else weight


@triton.jit
def between_passes():
    """The second pass reads rows and weights again, from cache; the compiler would else keep the first pass's reads in
    registers, and there is no room for them.
    """
    tl.debug_barrier()


@triton.jit
def projection_sums(p, like, S: tl.constexpr):
    """Sum of the columns of each row of the projection, [KP], which a slot's mean is multiplied by."""
    CHUNKS: tl.constexpr = S.CHUNKS
    total = tl.zeros([S.KP], tl.float32)
    if S.NORM == "layernorm":
        for n in tl.static_range(CHUNKS):
            total += tl.sum(tl.sum(load_projection(p, n, like, S).to(tl.float32), axis=2), axis=0)
    return total


@triton.jit
def no_products(S: tl.constexpr):
    """Products of a tile's rows, per warp: with W and with themselves, and their sums."""
    return (
        tl.zeros([S.W, S.R, S.KP], tl.float32),
        tl.zeros([S.W, S.R, S.R], tl.float32),
        tl.zeros([S.W, S.R], tl.float32),
    )


@triton.jit
def add_products(products, h, p, n, like, S: tl.constexpr):
    """Add chunk n of h to the products that a width connection needs."""
    z, gram, sums = products
    if S.TO > 0:
        z = rows_by_rows(h, load_projection(p, n, like, S), z, S)
    gram = rows_by_rows(h, h, gram, S)
    if S.NORM == "layernorm" or S.SUB_NORM == "layernorm":
        sums += tl.sum(h.to(tl.float32), axis=2)
    return z, gram, sums


@triton.jit
def over_warps(products):
    """The products of whole rows: [R, KP], [R, R], [R]."""
    z, gram, sums = products
    return tl.sum(z, axis=0), tl.sum(gram, axis=0), tl.sum(sums, axis=0)


@triton.jit
def coefficients(products, given, p, w_sums, first, count, S: tl.constexpr):
    """Coefficients, z and tanh(z) as tables, mean and reciprocal deviation of each row (eq. 9-14)."""
    z, gram, sums = products
    mean, deviation = moments(sums, diagonal(gram, S), S.NORM, S.EPS, S.C)
    z = deviation[:, None] * less(z, mean[:, None] * w_sums[None, :], S.NORM)
    t = tanh(z) if S.TANH else z
    table = static_table(p, S) if given.gamma is None else given_table(given, first, count, S)
    if S.TO > 0:
        table += scales(p, S)[None, :] * t
    table += spoiled(gram, S)[:, None]
    return table, z, t, mean, deviation


@triton.jit
def input_moments(gamma, products, S: tl.constexpr):
    """Mean and reciprocal deviation of x = gamma^T h over each token's row, and the products (h_i, x_j)."""
    _, gram, sums = products
    gram_gamma = tl.dot(tl.where(same_token(S), gram, 0.0), gamma, input_precision="tf32x3")
    gram_gamma = tl.where(same_token(S), gram_gamma, 0.0)
    squares = token_sum(tl.sum(gamma * gram_gamma, axis=1), S)
    if S.SUB_NORM == "layernorm":
        sums = token_sum(tl.sum(gamma, axis=1) * sums, S)
    mean, deviation = moments(sums, squares, S.SUB_NORM, S.SUB_EPS, S.M * S.C)
    return mean, deviation, gram_gamma


@triton.jit
def width_forward_kernel(h, pre, given, p, norm, x, beta, alpha, count, S: tl.constexpr):
    """count: rows of h, that is tokens times N. With `pre.o`, h is made and stored by the depth connection before."""
    CHUNKS: tl.constexpr = S.CHUNKS
    w_sums = projection_sums(p, h, S)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, S.R), tl.num_programs(0), disable_licm=True):
        first = tile * S.R
        products = no_products(S)
        if pre.o is not None:
            pre_beta, pre_alpha = beta_rows(pre.beta, first, count, S), alpha_matrix(pre.alpha, first, count, S)
        for n in tl.range(CHUNKS, disable_licm=True):
            if pre.o is not None:
                rows = depth_chunk(pre, pre_beta, pre_alpha, first, count, n, h, S)
                store_chunk(h, rows, first, count, n, S, "slots")
            else:
                rows = load_chunk(h, first, count, n, S, "slots")
            products = add_products(products, rows, p, n, h, S)

        between_passes()
        products = over_warps(products)
        table, _, _, _, _ = coefficients(products, given, p, w_sums, first, count, S)
        if beta is not None:
            store_coefficients(table, beta, alpha, first, count, S)
        if x is not None:
            gamma = from_table(table, 1, S.M, S)
            if S.SUB_NORM != "none":
                mean, deviation, _ = input_moments(gamma, products, S)
            for back in tl.range(CHUNKS, disable_licm=True):
                n = CHUNKS - 1 - back
                out = mix(tl.trans(gamma), load_chunk(h, first, count, n, S, "slots"), S)
                if S.SUB_NORM != "none":
                    out = less(out, mean[None, :, None], S.SUB_NORM) * deviation[None, :, None]
                    out *= weight_chunk(norm, n, S)
                    if norm.bias is not None:
                        out += load_weight(norm.bias, n, S)
                store_chunk(x, out, first, count, n, S, "fractions")


@triton.jit
def input_gradient_products(gamma, with_x, u_sums, products, S: tl.constexpr):
    """Backward of the sub-layer's norm between the passes: its statistics, and the products (h_i, g_x_j)."""
    mean, deviation, gram_gamma = input_moments(gamma, products, S)
    h_sums = products[2][:, None]
    total = tl.zeros_like(mean)
    along = token_sum(tl.sum(gamma * with_x, axis=1), S)
    if S.SUB_NORM == "layernorm":
        u_total = token_sum(u_sums, S)
        along -= mean * u_total
        total = u_total / (S.M * S.C)
    along *= deviation / (S.M * S.C)
    with_normed = deviation[:, None] * less(gram_gamma, mean[:, None] * h_sums, S.SUB_NORM)
    with_g = deviation[:, None] * (less(with_x, total[:, None] * h_sums, S.SUB_NORM) - along[:, None] * with_normed)
    return tl.where(same_token(S), with_g, 0.0), (mean, deviation, along, total)


@triton.jit
def width_backward_kernel(g_x, g_beta, g_mixed, h, pre, given, p, norm, g_h, partial, count, S: tl.constexpr):
    """count: rows of h, that is tokens times N. Absent gradients are None.

    With `pre.o`, the gradient of h goes on through the depth connection that made h.
    """
    CHUNKS: tl.constexpr = S.CHUNKS
    w_sums = projection_sums(p, h, S)
    d_table, d_scaled, d_shift = (
        tl.zeros([S.R, S.KP], tl.float32),
        tl.zeros([S.KP], tl.float32),
        tl.zeros([S.KP], tl.float32),
    )
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, S.R), tl.num_programs(0), disable_licm=True):
        first = tile * S.R
        started = tile >= tl.num_programs(0)
        products = no_products(S)
        with_x, u_sums = products[1], products[2]
        with_mixed = with_x
        next_h = ask(h, first, count, 0, S, "slots")
        if g_x is not None:
            next_x = ask(g_x, first, count, 0, S, "fractions")
        if g_mixed is not None:
            next_mixed = ask(g_mixed, first, count, 0, S, "slots")
        for n in tl.range(CHUNKS, disable_licm=True):
            rows = gathered(next_h, S)
            next_h = ask(h, first, count, n + 1, S, "slots")
            if g_x is not None:
                u = gathered(next_x, S)
                next_x = ask(g_x, first, count, n + 1, S, "fractions")
            if g_mixed is not None:
                g = gathered(next_mixed, S)
                next_mixed = ask(g_mixed, first, count, n + 1, S, "slots")
            products = add_products(products, rows, p, n, h, S)
            if g_x is not None:
                if S.SUB_NORM != "none":
                    u = (u * weight_chunk(norm, n, S)).to(rows.dtype)
                    if S.SUB_NORM == "layernorm":
                        u_sums += tl.sum(u.to(tl.float32), axis=2)
                with_x = rows_by_rows(rows, u, with_x, S)
            if g_mixed is not None:
                with_mixed = rows_by_rows(rows, g, with_mixed, S)

        between_passes()
        products = over_warps(products)
        table, z, t, mean, deviation = coefficients(products, given, p, w_sums, first, count, S)
        with_x = tl.where(same_token(S), tl.sum(with_x, axis=0), 0.0)
        with_mixed = tl.where(same_token(S), tl.sum(with_mixed, axis=0), 0.0)
        table += spoiled(tl.abs(with_x) + tl.abs(with_mixed), S)[:, None]
        gamma, alpha = from_table(table, 1, S.M, S), from_table(table, 1 + S.M, S.N, S)
        if S.SUB_NORM != "none":
            with_x, sub = input_gradient_products(gamma, with_x, tl.sum(u_sums, axis=0), products, S)
        d = to_table(with_x, 1, S.M, S) + to_table(with_mixed, 1 + S.M, S.N, S)
        if g_beta is not None:
            at = first + tl.arange(0, S.R)
            d_beta = tl.load(g_beta + at, mask=at < count, other=0.0)
            d += tl.where((tl.arange(0, S.KP) == 0)[None, :], d_beta[:, None], 0.0)
        if given.gamma is not None:
            store_given_gradients(d, given, first, count, S)
        dz = d * scales(p, S)[None, :]
        if S.TANH:
            dz *= 1.0 - t * t
        slope = deviation * deviation * row_sum(dz * z, S) / S.C
        dz *= deviation[:, None]
        shift = row_sum(dz * w_sums[None, :], S) / S.C
        d_table += d
        d_scaled += tl.sum(d * t, axis=0)
        d_shift += tl.sum(dz * mean[:, None], axis=0)

        if pre.o is not None:
            pre_beta, d_pre_beta = beta_rows(pre.beta, first, count, S), tl.zeros([S.W, S.R], tl.float32)
        for back in tl.range(CHUNKS, disable_licm=True):
            n = CHUNKS - 1 - back
            rows = load_chunk(h, first, count, n, S, "slots")
            g = tl.zeros([S.W, S.R, S.K], tl.float32)
            if g_x is not None:
                u = load_chunk(g_x, first, count, n, S, "fractions")
                if S.SUB_NORM != "none":
                    normed = mix(tl.trans(gamma), rows, S)
                    normed = less(normed, sub[0][None, :, None], S.SUB_NORM) * sub[1][None, :, None]
                    add_weight(partial.weight, u * normed, n, started, S)
                    if norm.bias is not None:
                        add_weight(partial.bias, u.to(tl.float32), n, started, S)
                    u = less(u * weight_chunk(norm, n, S), sub[3][None, :, None], S.SUB_NORM)
                    u = ((u - normed * sub[2][None, :, None]) * sub[1][None, :, None]).to(rows.dtype)
                g += mix(gamma, u, S)
            if g_mixed is not None:
                g += mix(alpha, load_chunk(g_mixed, first, count, n, S, "slots"), S)
            if S.TO > 0:
                g += table_by_rows(dz, load_projection(p, n, h, S), S)
                if S.NORM != "none":
                    g -= slope[None, :, None] * less(rows.to(tl.float32), mean[None, :, None], S.NORM)
                    g = less(g, shift[None, :, None], S.NORM)
                add_projection(partial.projection, dz, rows, n, started, S)
            store_chunk(g_h, g, first, count, n, S, "slots")
            if pre.o is not None:
                rounded = g.to(g_h.dtype.element_ty)
                d_pre_beta += depth_gradient_chunk(rounded, pre, pre_beta, partial, first, count, n, started, h, S)
        if pre.o is not None:
            at = first + tl.arange(0, S.R)
            tl.store(pre.g_beta + at, tl.sum(d_pre_beta, axis=0), mask=at < count)
    if partial.table is not None:
        store_table_sums(partial, d_table, d_scaled, d_shift, S)
