"""The width connection of coefficients on a manifold as a torch.library custom op: torch predicts, a kernel mixes.

For backward is kept h alone; the coefficients are computed again. The depth connection is that of all kinds (`ops`).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_fc.connections import eager
from megatron_fc.connections.handover import Handover, without_storage
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.once import differentiated_once
from megatron_fc.connections.operands import ManifoldOperands
from megatron_fc.connections.ops import (
    NORM,
    coefficients_like,
    contiguous,
    define,
    input_like,
    norm_of,
    norm_values,
    present,
)

_SITE = (
    "Tensor mapping_weight, Tensor mapping_bias, Tensor mapping_scale, int slots, int fractions, "
    "int sinkhorn_iterations, float sinkhorn_eps, float norm_eps"
)
_N_PARAMETERS, _N_OPERANDS = len(ManifoldParameters._fields), len(ManifoldOperands._fields)


def width(h: Tensor, p: ManifoldOperands, norm: NormWeights | None, want_x: bool = True) -> tuple[Tensor, Handover]:
    """Width connection: x or norm(x) [..., d] (empty without want_x), and what the depth connection takes over."""
    x, beta, alpha, mixed = _width(h, *p, *norm_values(norm), want_x)
    return x, Handover(beta, alpha, mixed, "triton")


def _kernels() -> ModuleType:
    from megatron_fc.connections.kernels import launch

    return launch


def _impl(h: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, norm, want_x = ManifoldOperands(*values[:_N_OPERANDS]), norm_of(values[_N_OPERANDS:-1]), values[-1]
    h = h.contiguous()
    beta, gamma, alpha, _ = eager.mapping_forward(h, p)
    x = _kernels().given_width_forward(h, gamma, p.fractions, norm) if want_x else h.new_empty(0)
    return x, beta, alpha, without_storage(h)


def _fake(h: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = ManifoldOperands(*values[:_N_OPERANDS])
    return input_like(h, p) if values[-1] else h.new_empty(0), *coefficients_like(h, p.slots)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, *values = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(h, *values[:_N_PARAMETERS], *values[_N_OPERANDS : _N_OPERANDS + 2])
    ctx.values = (values[_N_PARAMETERS:_N_OPERANDS], values[_N_OPERANDS + 2 : -1])


@differentiated_once
def _grad(ctx: Any, g_x: Tensor | None, g_beta: Tensor | None, _: Any, g_mixed: Tensor | None) -> tuple[Any, ...]:
    h, *tensors = ctx.saved_tensors
    site, norm = ctx.values
    if g_x is not None and not g_x.numel():
        g_x = None
    values = (*tensors[:_N_PARAMETERS], *site, *tensors[_N_PARAMETERS:], *norm)
    g_h, *gradients = _backward(g_x, g_beta, g_mixed, h, *values)
    rest = iter(gradients[_N_PARAMETERS:])
    of_norm = [None if t is None or g_x is None else next(rest) for t in tensors[_N_PARAMETERS:]]
    return g_h, *gradients[:_N_PARAMETERS], *[None] * len(site), *of_norm, *[None] * len(norm), None


def _backward_impl(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, *values: Any
) -> list[Tensor]:
    p, norm = ManifoldOperands(*values[:_N_OPERANDS]), norm_of(values[_N_OPERANDS:])
    h = h.contiguous()
    _, gamma, alpha, mapping = eager.mapping_forward(h, p)
    incoming = (contiguous(g_x), contiguous(g_mixed))
    g_h, g_gamma, g_alpha, of_norm = _kernels().given_width_backward(*incoming, h, gamma, alpha, p.fractions, norm)
    gradients = eager.mapping_backward(g_beta, g_gamma, g_alpha, g_h, mapping, p)
    return [g_h, *gradients, *present((of_norm.weight, of_norm.bias))]


def _backward_fake(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, *values: Any
) -> list[Tensor]:
    norm = values[_N_OPERANDS : _N_OPERANDS + 2] if g_x is not None else ()
    stream = torch.empty_like(h, memory_format=torch.contiguous_format)
    return [stream, *(torch.empty_like(tensor) for tensor in present((*values[:_N_PARAMETERS], *norm)))]


_backward = define(
    "manifold_width_backward",
    f"(Tensor? g_x, Tensor? g_beta, Tensor? g_mixed, Tensor h, {_SITE}, {NORM}) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
_width = define(
    "manifold_width",
    f"(Tensor h, {_SITE}, {NORM}, bool want_x) -> (Tensor, Tensor, Tensor, Tensor)",
    _impl,
    _fake,
    _context,
    _grad,
)
