"""Coefficients on a manifold from <W, stream> and back, in one launch each.

A program is a warp with a lane, or a few, per token. Tables come with the tokens last, [.., TOKENS]: what is not finite
stays within its token. Backward makes the coefficients again. What Sinkhorn divides by, (2 * iterations - 1) * n values
of a token, does not fit into registers; meanwhile it lies in memory, which a cache holds.

Rows of <W, stream> and of its gradient are numbered as those of W: pre, post, res. Of a bf16 stream the product comes
as that of W's upper halves and below it that of the lower ones, and its gradient goes out in halves.
"""

import triton
import triton.language as tl

from megatron_fc.connections.kernels.sums import over_programs


@triton.jit
def in_halves(values):
    """Two of bf16, whose sum keeps 16 bits of fp32's 24."""
    upper = values.to(tl.bfloat16)
    return upper, (values - upper.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def halves_kernel(matrix, out, size, N: tl.constexpr):
    """fp32 values in halves, as three blocks of `size` values: upper ones, lower ones, and the upper ones again."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    upper, lower = in_halves(tl.load(matrix + at, mask=at < size, other=0.0))
    tl.store(out + at, upper, mask=at < size)
    tl.store(out + at + size, lower, mask=at < size)
    tl.store(out + at + 2 * size, upper, mask=at < size)


@triton.jit
def inverse_rms(norm, token, inside, width, eps):
    """1 / the root mean square of each token's stream, from its norm, [TOKENS]."""
    value = tl.load(norm + token, mask=inside, other=0.0)
    return tl.rsqrt(value * value / width + eps)


@triton.jit
def z_rows(product, row, token, tokens, K: tl.constexpr, HALVES: tl.constexpr):
    """These rows of <W, stream>, [.., TOKENS]."""
    at = row * tokens + token
    values = tl.load(product + at, mask=token < tokens, other=0.0)
    if HALVES == 2:
        values += tl.load(product + at + K * tokens, mask=token < tokens, other=0.0)
    return values


@triton.jit
def softmax(logits):
    """Over each row of [n, n, TOKENS]."""
    values = tl.exp(logits - tl.max(logits, axis=1)[:, None, :])
    return values * (1.0 / tl.sum(values, axis=1))[:, None, :]


@triton.jit
def sums_at(turn, token, tokens, N: tl.constexpr):
    """Where a turn's sums are in [turns, n, T]."""
    return (turn * N + tl.arange(0, N)[:, None]) * tokens + token[None, :]


@triton.jit
def sinkhorn(table, sums, token, tokens, iterations, eps, N: tl.constexpr):
    """Normalise columns, then rows and columns in turn, [n, n, TOKENS]; with `sums`, keep there what was divided by."""
    total = tl.sum(table, axis=0) + eps
    table *= (1.0 / total)[None, :, :]
    if sums is not None:
        tl.store(sums + sums_at(0, token, tokens, N), total, mask=token[None, :] < tokens)
    for i in tl.range(1, iterations):
        rows = tl.sum(table, axis=1) + eps
        table *= (1.0 / rows)[:, None, :]
        columns = tl.sum(table, axis=0) + eps
        table *= (1.0 / columns)[None, :, :]
        if sums is not None:
            tl.store(sums + sums_at(2 * i - 1, token, tokens, N), rows, mask=token[None, :] < tokens)
            tl.store(sums + sums_at(2 * i, token, tokens, N), columns, mask=token[None, :] < tokens)
    return table


@triton.jit
def sinkhorn_backward(g, table, sums, token, tokens, iterations, N: tl.constexpr):
    """Gradient of what `sinkhorn` was given from that of its result; the table goes back step by step."""
    inside = token[None, :] < tokens
    for step in tl.range(1, iterations):
        i = iterations - step
        columns = tl.load(sums + sums_at(2 * i, token, tokens, N), mask=inside, other=1.0)
        rows = tl.load(sums + sums_at(2 * i - 1, token, tokens, N), mask=inside, other=1.0)
        g = (g - tl.sum(g * table, axis=0)[None, :, :]) * (1.0 / columns)[None, :, :]
        table *= columns[None, :, :]
        g = (g - tl.sum(g * table, axis=1)[:, None, :]) * (1.0 / rows)[:, None, :]
        table *= rows[:, None, :]
    columns = tl.load(sums + sums_at(0, token, tokens, N), mask=inside, other=1.0)
    return (g - tl.sum(g * table, axis=0)[None, :, :]) * (1.0 / columns)[None, :, :]


@triton.jit(do_not_specialize=["tokens", "width", "iterations"])
def tables_forward_kernel(
    product, norm, bias, scale, beta, gamma, alpha, tokens, width, iterations, eps, norm_eps,
    HALVES: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """<W, stream> [HALVES * K, T] and the stream's norm [T] -> beta [T, n], gamma [T, n*m], alpha [T, n*n]."""
    NM: tl.constexpr = N * M
    K: tl.constexpr = NM + N + N * N
    tokens = tokens.to(tl.int64)  # for addresses
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    r = inverse_rms(norm, token, inside, width, norm_eps)

    row = tl.arange(0, NM)[:, None]
    z = z_rows(product, row, token[None, :], tokens, K, HALVES) * r[None, :]
    pre = tl.sigmoid(tl.load(bias + row) + tl.load(scale) * z) + eps
    tl.store(gamma + token[None, :] * NM + row, pre, mask=inside[None, :])

    row = tl.arange(0, N)[:, None]
    z = z_rows(product, NM + row, token[None, :], tokens, K, HALVES) * r[None, :]
    post = 2.0 * tl.sigmoid(tl.load(bias + NM + row) + tl.load(scale + 1) * z)
    tl.store(beta + token[None, :] * N + row, post, mask=inside[None, :])

    row = tl.arange(0, N)[:, None, None] * N + tl.arange(0, N)[None, :, None]
    z = z_rows(product, NM + N + row, token[None, None, :], tokens, K, HALVES) * r[None, None, :]
    table = softmax(tl.load(bias + NM + N + row) + tl.load(scale + 2) * z) + eps
    table = sinkhorn(table, None, token, tokens, iterations, eps, N)
    tl.store(alpha + token[None, None, :] * (N * N) + row, table, mask=inside[None, None, :])


@triton.jit
def store_gradient(g_product, values, row, token, tokens, K: tl.constexpr, HALVES: tl.constexpr):
    """These rows of the product's gradient; in halves as [3K, T], rows of upper, upper and lower ones."""
    at, inside = row * tokens + token, token < tokens
    if HALVES == 1:
        tl.store(g_product + at, values, mask=inside)
    else:
        upper, lower = in_halves(values)
        tl.store(g_product + at, upper, mask=inside)
        tl.store(g_product + at + K * tokens, upper, mask=inside)
        tl.store(g_product + at + 2 * K * tokens, lower, mask=inside)


@triton.jit(do_not_specialize=["tokens", "width", "iterations"])
def tables_backward_kernel(
    g_beta, g_gamma, g_alpha, product, norm, bias, scale, g_product, pull, partial, sums,
    tokens, width, iterations, eps, norm_eps,
    HALVES: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """From gradients of the coefficients, None for zero, to those of the product, and to the stream's multiple `pull`.

    A program's sums over its tokens go to `partial` [programs, K+3]: of the bias, and of the three scales.
    """
    NM: tl.constexpr = N * M
    K: tl.constexpr = NM + N + N * N
    tokens = tokens.to(tl.int64)  # for addresses
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    partial += tl.program_id(0) * (K + 3)
    r = inverse_rms(norm, token, inside, width, norm_eps)

    row = tl.arange(0, N)[:, None, None] * N + tl.arange(0, N)[None, :, None]
    z = z_rows(product, NM + N + row, token[None, None, :], tokens, K, HALVES) * r[None, None, :]
    res = tl.load(scale + 2)
    g = tl.zeros_like(z)
    if g_alpha is not None:
        values = softmax(tl.load(bias + NM + N + row) + res * z)
        table = sinkhorn(values + eps, sums, token, tokens, iterations, eps, N)
        tl.debug_barrier()  # the sums are read back, by whichever lane
        g = tl.load(g_alpha + token[None, None, :] * (N * N) + row, mask=inside[None, None, :], other=0.0)
        g = sinkhorn_backward(g, table, sums, token, tokens, iterations, N)
        # Made again, for want of registers in between.
        z = z_rows(product, NM + N + row, token[None, None, :], tokens, K, HALVES) * r[None, None, :]
        values = softmax(tl.load(bias + NM + N + row) + res * z)
        g = values * (g - tl.sum(g * values, axis=1)[:, None, :])
    through_r = res * tl.sum(tl.sum(g * z, axis=1), axis=0)
    tl.store(partial + NM + N + row, tl.sum(g, axis=2)[:, :, None])
    tl.store(partial + K + 2, tl.sum(tl.sum(tl.sum(g * z, axis=1), axis=0), axis=0))
    store_gradient(g_product, g * (res * r)[None, None, :], NM + N + row, token[None, None, :], tokens, K, HALVES)

    row = tl.arange(0, NM)[:, None]
    z = z_rows(product, row, token[None, :], tokens, K, HALVES) * r[None, :]
    pre = tl.load(scale)
    g = tl.zeros_like(z)
    if g_gamma is not None:
        values = tl.sigmoid(tl.load(bias + row) + pre * z)
        g = tl.load(g_gamma + token[None, :] * NM + row, mask=inside[None, :], other=0.0) * values * (1.0 - values)
    through_r += pre * tl.sum(g * z, axis=0)
    tl.store(partial + row, tl.sum(g, axis=1)[:, None])
    tl.store(partial + K, tl.sum(tl.sum(g * z, axis=0), axis=0))
    store_gradient(g_product, g * (pre * r)[None, :], row, token[None, :], tokens, K, HALVES)

    row = tl.arange(0, N)[:, None]
    z = z_rows(product, NM + row, token[None, :], tokens, K, HALVES) * r[None, :]
    post = tl.load(scale + 1)
    g = tl.zeros_like(z)
    if g_beta is not None:
        values = 2.0 * tl.sigmoid(tl.load(bias + NM + row) + post * z)
        g = tl.load(g_beta + token[None, :] * N + row, mask=inside[None, :], other=0.0) * values * (1.0 - values / 2)
    through_r += post * tl.sum(g * z, axis=0)
    tl.store(partial + NM + row, tl.sum(g, axis=1)[:, None])
    tl.store(partial + K + 1, tl.sum(tl.sum(g * z, axis=0), axis=0))
    store_gradient(g_product, g * (post * r)[None, :], NM + row, token[None, :], tokens, K, HALVES)

    # dr/dh = -r^3 h / (n*c), and sum_k g <W, h> is known from z.
    tl.store(pull + token, -through_r * r * r / width, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def tables_sums_kernel(partial, g_bias, g_scale, programs, K: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr):
    """Gradients of bias [K] and scale [3] from the programs' sums, COLUMNS of them in a program."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = over_programs(partial, K + 3, column, column < K + 3, programs, P)
    tl.store(g_bias + column, total, mask=column < K)
    tl.store(g_scale + column - K, total, mask=(column >= K) & (column < K + 3))
