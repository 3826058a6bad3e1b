"""Coefficients on a manifold for kernels that mix with them: a bf16 stream is read as it is, never as a copy in fp32.

Its products with what has fp32 are torch's, with two bf16 halves of that, as in the kernels: they keep 16 of 24 bits,
far more than the stream has. Sums are in fp32. In fp16 small gradients would vanish, so that such a stream is copied.
What lies between the products is small, and one kernel (`ops_of_mapping`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.eager import as_written, in_fp32
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.operands import ManifoldOperands, Projected, refuse_low_precision
from megatron_fc.connections.ops_of_mapping import halves, tables, tables_backward


class Mapping(NamedTuple):
    """What backward needs of the coefficients beside the stream.

    Attributes:
        weight: W [K, n*c] in fp32, or for a bf16 stream in halves, [3K, n*c]: upper ones, lower ones, upper ones.
        projected: what the coefficients were made from.
    """

    weight: Tensor
    projected: Projected


@as_written
def coefficients(h: Tensor, p: ManifoldOperands) -> tuple[Tensor, Tensor, Tensor, Mapping]:
    """The coefficients of a stream [..., n*c].

    Returns:
        beta [T, n], gamma [T, n*m] and alpha [T, n*n], row-major, in fp32; and what `coefficients_backward` takes.
    """
    refuse_low_precision(p)
    stream, p = _stream(h), in_fp32(p, h)
    rows, width = p.mapping_weight.shape
    norm = torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32)
    weight = p.mapping_weight if stream.dtype == torch.float32 else halves(p.mapping_weight)
    product = _product(weight[: 2 * rows], stream.t())  # without the last of three blocks, if it has them
    shape, sinkhorn = (width, p.slots, p.fractions), (p.sinkhorn_iterations, p.sinkhorn_eps)
    projected = Projected(product, norm, p.mapping_bias, p.mapping_scale, *shape, *sinkhorn, p.norm_eps)
    return *tables(*projected), Mapping(weight, projected)


@as_written
def coefficients_backward(
    g_beta: Tensor | None,
    g_gamma: Tensor | None,
    g_alpha: Tensor | None,
    g_h: Tensor,
    h: Tensor,
    made: Mapping,
    p: ManifoldOperands,
) -> ManifoldParameters:
    """Gradients of the parameters; adds what the stream gets through the coefficients to g_h.

    Args:
        g_beta: gradient of beta [T, n]. None stands for zero, here and below.
        g_gamma: gradient of gamma [T, n*m].
        g_alpha: gradient of alpha [T, n*n].
        g_h: gradient of the stream [..., n*c], contiguous, in its dtype.
        h: the stream.
        made: of `coefficients`.
        p: the site.

    Returns:
        Gradients in the parameters' dtypes.
    """
    stream, rows = _stream(h), len(p.mapping_bias)
    # Of the four products of halves the one of both lower ones is below what rounding leaves.
    product, pull, bias, scale = tables_backward(g_beta, g_gamma, g_alpha, *made.projected)
    g_stream = g_h.view(stream.shape)
    g_stream.addcmul_(stream, pull.unsqueeze(1))
    if g_stream.dtype == product.dtype:
        g_stream.addmm_(product.t(), made.weight)
    else:
        g_stream.add_(product.t() @ made.weight)
    weight = _product(product[-2 * rows :], stream)
    if made.projected.in_halves:
        weight = weight[:rows] + weight[rows:]
    gradients = (weight, bias, scale)
    return ManifoldParameters._make(g.to(q.dtype) for g, q in zip(gradients, p.parameters, strict=True))


def _stream(h: Tensor) -> Tensor:
    """[T, n*c], in bf16 or fp32."""
    stream = h.reshape(-1, h.shape[-1])
    return stream if h.dtype == torch.bfloat16 else stream.float()


def _product(matrix: Tensor, stream: Tensor) -> Tensor:
    """In fp32, with the stream or its transpose, both of one dtype."""
    if stream.dtype == torch.float32:
        return matrix @ stream
    # torch has products of 16 bits with sums in fp32 for CUDA alone.
    return torch.mm(matrix, stream, out_dtype=torch.float32) if stream.is_cuda else matrix.float() @ stream.float()
