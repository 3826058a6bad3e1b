"""Coefficients on a manifold for kernels that mix with them: a bf16 stream is read as it is, never as a copy in fp32.

Its products with what has fp32 are taken with two bf16 halves of that, as in the kernels: they keep 16 of 24 bits, far
more than the stream has. Sums are in fp32. In fp16 small gradients would vanish, so that such a stream is copied.
"""

import torch
from torch import Tensor

from megatron_fc.connections.eager import as_written, in_fp32
from megatron_fc.connections.eager_on_manifold import Tables, tables, tables_backward
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.operands import ManifoldOperands, refuse_low_precision


@as_written
def coefficients(h: Tensor, p: ManifoldOperands) -> tuple[Tensor, Tensor, Tensor, Tables]:
    """The coefficients of a stream [..., n*c].

    Returns:
        beta [T, n], gamma [T, n*m] and alpha [T, n*n], row-major, in fp32; and what `coefficients_backward` takes.
    """
    refuse_low_precision(p)
    stream, p = _stream(h), in_fp32(p, h)
    norm = torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32)
    halves = _halves(p.mapping_weight, stream)
    made = tables(_product(halves, stream.t(), len(p.mapping_weight)), norm, p)
    gamma, alpha = ((t.permute(2, 0, 1).flatten(1)) for t in (made.gamma + p.sinkhorn_eps, made.alpha))
    return made.beta.t().contiguous(), gamma.contiguous(), alpha.contiguous(), made


@as_written
def coefficients_backward(
    g_beta: Tensor | None,
    g_gamma: Tensor | None,
    g_alpha: Tensor | None,
    g_h: Tensor,
    h: Tensor,
    made: Tables,
    p: ManifoldOperands,
) -> ManifoldParameters:
    """Gradients of the parameters; adds what the stream gets through the coefficients to g_h.

    Args:
        g_beta: gradient of beta [T, n]. None stands for zero, here and below.
        g_gamma: gradient of gamma [T, n*m].
        g_alpha: gradient of alpha [T, n*n].
        g_h: gradient of the stream [..., n*c], contiguous, in its dtype.
        h: the stream.
        made: of `coefficients`, overwritten.
        p: the site.

    Returns:
        Gradients in the parameters' dtypes.
    """
    n, m, given = p.slots, p.fractions, p.parameters
    stream, p = _stream(h), in_fp32(p, h)
    tokens = stream.shape[0]
    sides = [
        made.r.new_zeros(tokens, n, count) if g is None else g.view(tokens, n, count)
        for g, count in ((g_gamma, m), (g_alpha, n))
    ]
    g_beta = made.r.new_zeros(tokens, n) if g_beta is None else g_beta
    g = tables_backward(g_beta, torch.cat(sides, 2), made, p)
    g_stream, product, rows = g_h.view(stream.shape), _halves(g.product, stream), len(g.product)
    g_stream.addcmul_(stream, g.pull.unsqueeze(1))
    if g_stream.dtype == torch.bfloat16:
        # Of the four products of halves the one of both lower ones is below what rounding leaves.
        (high, low), (weight, rest) = product.split(rows), _halves(p.mapping_weight, stream).split(rows)
        g_stream.addmm_(torch.cat((high, high, low)).t(), torch.cat((weight, rest, weight)))
    elif g_stream.dtype == torch.float32:
        g_stream.addmm_(product.t(), p.mapping_weight)
    else:
        g_stream.add_(product.t() @ p.mapping_weight)
    weight = _product(product, stream, rows)
    gradients = (weight, g.bias, g.scale)
    return ManifoldParameters._make(g.to(q.dtype) for g, q in zip(gradients, given, strict=True))


def _stream(h: Tensor) -> Tensor:
    """[T, n*c], in bf16 or fp32."""
    stream = h.reshape(-1, h.shape[-1])
    return stream if h.dtype == torch.bfloat16 else stream.float()


def _halves(matrix: Tensor, like: Tensor) -> Tensor:
    """An fp32 matrix [K, ...] for products with a stream: itself, or with a bf16 one its halves [2K, ...]."""
    if like.dtype == matrix.dtype:
        return matrix
    high = matrix.to(like.dtype)
    return torch.cat((high, (matrix - high).to(like.dtype)))


def _product(halves: Tensor, stream: Tensor, rows: int) -> Tensor:
    """The product of a matrix [rows, ...], given as `_halves`, with a stream or its transpose, in fp32."""
    if stream.dtype == torch.float32:
        return halves @ stream
    # torch has products of 16 bits with sums in fp32 for CUDA alone.
    made = torch.mm(halves, stream, out_dtype=torch.float32) if stream.is_cuda else halves.float() @ stream.float()
    return made[:rows] + made[rows:]
