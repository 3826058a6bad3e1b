"""Depth connection: h'_j = beta_j o_((j-1) mod m + 1) + sum_i alpha_ij h_i, with the bias and dropout of Megatron's
slot on o.

| | reads | writes | elements of d per token | r = n/m = 1 |
|---|---|---|---|---|
| forward | o, h | h' | 2r + 1 | 3 |
| backward | g, o | g_o | r + 2 | 3 |

The mixed residual A^T h is never in memory: forward makes it on the way, and its gradient is g itself. Per token there
are also, in fp32, beta and alpha in forward, beta and its gradient in backward.
"""

import triton
import triton.language as tl

from megatron_fc.connections.kernels.sums import add_weight
from megatron_fc.connections.kernels.tiles import (
    by_lanes,
    gathered,
    load_chunk,
    load_weight,
    mix,
    of_fraction,
    over_turns,
    same_token,
    store_chunk,
)


@triton.jit
def alpha_matrix(alpha, first, count, S: tl.constexpr):
    """alpha^T of a tile, [R, R] from source to destination slots, zero between tokens."""
    r = tl.arange(0, S.R)
    at = (first + r[None, :]) * S.N + r[:, None] % S.N
    return tl.load(alpha + at, mask=same_token(S) & (first + r < count)[None, :], other=0.0)


@triton.jit
def beta_rows(beta, first, count, S: tl.constexpr):
    rows = first + tl.arange(0, S.R)
    return tl.load(beta + rows, mask=rows < count, other=0.0)


@triton.jit
def kept_by_dropout(seed, probability, first, n, S: tl.constexpr):
    """What is kept of chunk n, [W, R, K]: the same in forward and backward, whatever the launch, and for all slots that
    a fraction is written to.

    One call of the generator gives the random numbers of four neighbouring columns.
    """
    fours = tl.arange(0, S.W)[None, :, None, None] * (S.K // 4) + tl.arange(0, S.K // 4)[None, None, None, :]
    at = n * (S.W * S.K // 4) + of_fraction(by_lanes(S.R, S), S) * tl.cdiv(S.C, 4) + fours
    a, b, c, d = tl.rand4x(tl.load(seed) + of_fraction(first, S), at)
    values = tl.join(tl.join(a, c), tl.join(b, d))
    return gathered(tl.reshape(values, [S.L, S.W, S.R // S.L, S.K]), S) >= probability


@triton.jit
def output_chunk(pre, first, count, n, like, S: tl.constexpr):
    """Chunk n of the sub-layer's output with bias and dropout, rounded after each as Megatron's own operation does."""
    o = load_chunk(pre.o, first, count, n, S, "turns").to(like.dtype.element_ty)
    if pre.bias is not None:
        bias = load_weight(pre.bias, n, S).to(o.dtype)
        o = (o.to(tl.float32) + bias.to(tl.float32)).to(o.dtype)
    if pre.seed is not None:
        dropped = tl.where(kept_by_dropout(pre.seed, pre.dropout, first, n, S), o, 0.0)
        o = (dropped.to(tl.float32) * (1.0 / (1.0 - pre.dropout))).to(o.dtype)
    return o


@triton.jit
def depth_chunk(pre, beta, alpha, first, count, n, like, S: tl.constexpr):
    """Chunk n of the next residual stream, in the dtype of the stream."""
    mixed = mix(alpha, load_chunk(pre.h, first, count, n, S, "slots"), S)
    return (mixed + beta[None, :, None] * output_chunk(pre, first, count, n, like, S).to(tl.float32)).to(
        like.dtype.element_ty
    )


@triton.jit
def depth_gradient_chunk(g, pre, beta, partial, first, count, n, started, like, S: tl.constexpr):
    """Store chunk n of the gradient of o; return the chunk's part of beta's gradient, [W, R]."""
    g = g.to(tl.float32)
    d_beta = tl.sum(g * output_chunk(pre, first, count, n, like, S).to(tl.float32), axis=2)
    g_o = beta[None, :, None] * g
    if pre.seed is not None:
        g_o = tl.where(kept_by_dropout(pre.seed, pre.dropout, first, n, S), g_o * (1.0 / (1.0 - pre.dropout)), 0.0)
    store_chunk(pre.g_o, over_turns(g_o, S), first, count, n, S, "fractions")
    if partial.output_bias is not None:
        add_weight(partial.output_bias, g_o, n, started, S)
    return d_beta


@triton.jit
def depth_forward_kernel(pre, out, count, S: tl.constexpr):
    """count: rows of h, that is tokens times N."""
    CHUNKS: tl.constexpr = S.CHUNKS
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, S.R), tl.num_programs(0), disable_licm=True):
        first = tile * S.R
        beta, alpha = beta_rows(pre.beta, first, count, S), alpha_matrix(pre.alpha, first, count, S)
        for n in tl.range(CHUNKS, disable_licm=True):
            store_chunk(out, depth_chunk(pre, beta, alpha, first, count, n, out, S), first, count, n, S, "slots")


@triton.jit
def depth_backward_kernel(g, pre, partial, count, S: tl.constexpr):
    """count: rows of h, that is tokens times N."""
    CHUNKS: tl.constexpr = S.CHUNKS
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, S.R), tl.num_programs(0), disable_licm=True):
        first = tile * S.R
        started = tile >= tl.num_programs(0)
        beta, d_beta = beta_rows(pre.beta, first, count, S), tl.zeros([S.W, S.R], tl.float32)
        for n in tl.range(CHUNKS, disable_licm=True):
            rows = load_chunk(g, first, count, n, S, "slots")
            d_beta += depth_gradient_chunk(rows, pre, beta, partial, first, count, n, started, g, S)
        at = first + tl.arange(0, S.R)
        tl.store(pre.g_beta + at, tl.sum(d_beta, axis=0), mask=at < count)
