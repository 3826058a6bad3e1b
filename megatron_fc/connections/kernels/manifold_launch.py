"""Launches of the kernels for coefficients on a manifold, on contiguous tensors; T tokens, n slots, m fractions."""

import torch
import triton
from torch import Tensor

from megatron_fc.connections.kernels.launch import on_device
from megatron_fc.connections.kernels.manifold import (
    halves_kernel,
    tables_backward_kernel,
    tables_forward_kernel,
    tables_sums_kernel,
)
from megatron_fc.connections.operands import Projected

_WARP = 32  # lanes, all that a program has
_SPLIT = 1024  # values of a program that splits a matrix
# Of the launch that adds up what programs have summed: columns of a program, programs at once.
_COLUMNS, _PROGRAMS = 8, 128


def halves(matrix: Tensor) -> Tensor:
    """A matrix [K, N] of fp32 as halves in bf16, [3K, N]: upper ones, lower ones, and the upper ones again."""
    made = matrix.new_empty(3 * len(matrix), matrix.shape[1], dtype=torch.bfloat16)
    with on_device(matrix.device):
        halves_kernel[triton.cdiv(matrix.numel(), _SPLIT),](matrix, made, matrix.numel(), _SPLIT)
    return made


def tables_forward(p: Projected) -> tuple[Tensor, Tensor, Tensor]:
    """beta [T, n], gamma [T, n*m] and alpha [T, n*n], row-major, in fp32."""
    n, m, norm = p.slots, p.fractions, p.norm
    beta, gamma, alpha = (norm.new_empty(len(norm), count) for count in (n, n * m, n * n))
    if len(norm):
        with on_device(norm.device):
            tables_forward_kernel[triton.cdiv(len(norm), _tokens(p)),](
                *p[:4], beta, gamma, alpha, len(norm), *_options(p), num_warps=1, num_stages=1
            )
    return beta, gamma, alpha


def tables_backward(
    g_beta: Tensor | None, g_gamma: Tensor | None, g_alpha: Tensor | None, p: Projected
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the product, the multiple [T] of each token's stream in its gradient, gradients of bias and scale.

    That of the product is as `Projected.product_gradient` says.
    """
    norm, n = p.norm, p.slots
    rows, tokens, programs = len(p.bias), len(norm), triton.cdiv(len(norm), _tokens(p))
    g_product, pull, partial = p.product_gradient(), torch.empty_like(norm), norm.new_empty(programs, rows + 3)
    g_bias, g_scale = torch.empty_like(p.bias), torch.empty_like(p.scale)
    sums = None if g_alpha is None else norm.new_empty(2 * p.iterations - 1, n, tokens)
    with on_device(norm.device):
        if tokens:
            tables_backward_kernel[programs,](
                g_beta, g_gamma, g_alpha, *p[:4], g_product, pull, partial, sums, tokens, *_options(p),
                num_warps=1, num_stages=1,
            )  # fmt: skip
        blocks = triton.cdiv(rows + 3, _COLUMNS)
        tables_sums_kernel[blocks,](partial, g_bias, g_scale, programs, rows, _COLUMNS, _PROGRAMS)
    return g_product, pull, g_bias, g_scale


def _options(p: Projected) -> tuple[int | float, ...]:
    numbers = (p.width, p.iterations, p.eps, p.norm_eps)
    return (*numbers, 1 + p.in_halves, p.slots, p.fractions, _tokens(p))


def _tokens(p: Projected) -> int:
    """Of a program: so few that a lane's registers hold its tables, so many that a row of them fills a sector."""
    return min(_WARP, 64 // p.slots)
