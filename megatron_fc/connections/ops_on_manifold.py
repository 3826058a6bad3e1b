"""The width connection of coefficients on a manifold: `mapping` predicts them, a kernel mixes with them.

The kernel's launches are custom ops. For backward is kept h alone; the coefficients are computed again. The depth
connection is that of all kinds (`ops`).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_fc.connections import mapping
from megatron_fc.connections.handover import Handover, without_storage
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.once import differentiated_once
from megatron_fc.connections.operands import ManifoldOperands
from megatron_fc.connections.ops import NORM, contiguous, define, norm_of, norm_values, present

_N_PARAMETERS, _N_OPERANDS = len(ManifoldParameters._fields), len(ManifoldOperands._fields)


def width(h: Tensor, p: ManifoldOperands, norm: NormWeights | None, want_x: bool = True) -> tuple[Tensor, Handover]:
    """Width connection: x or norm(x) [..., d] (empty without want_x), and what the depth connection takes over."""
    x, beta, alpha, mixed = _width(h, want_x, *p, *norm_values(norm))
    return x, Handover(beta, alpha, mixed, "triton")


class _Width(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, want_x: bool, *values: Any) -> tuple[Tensor, ...]:
        p, norm = ManifoldOperands(*values[:_N_OPERANDS]), values[_N_OPERANDS:]
        beta, gamma, alpha, _ = mapping.coefficients(h, p)
        x = _given_width(h, gamma, p.fractions, *norm) if want_x else h.new_empty(0)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(alpha)
        ctx.save_for_backward(h, *p.parameters, *norm[:2])
        ctx.values = (values[_N_PARAMETERS:_N_OPERANDS], norm[2:])
        return x, beta, alpha, without_storage(h)

    @staticmethod
    @differentiated_once
    def backward(
        ctx: Any, g_x: Tensor | None, g_beta: Tensor | None, _: Tensor | None, g_mixed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        h, *tensors = ctx.saved_tensors
        options, norm = ctx.values
        p = ManifoldOperands(*tensors[:_N_PARAMETERS], *options)
        of_norm = tensors[_N_PARAMETERS:]
        if g_x is not None and not g_x.shape[-1]:
            g_x = None
        _, gamma, alpha, tables = mapping.coefficients(h, p)
        g_h, *rest = _given_width_backward(g_x, g_mixed, h, gamma, alpha, p.fractions, *of_norm, *norm)
        made = iter(rest)
        g_gamma, g_alpha = (None if g is None else next(made) for g in (g_x, g_mixed))
        g_norm = [None if weight is None or g_x is None else next(made) for weight in of_norm]
        gradients = mapping.coefficients_backward(g_beta, g_gamma, g_alpha, g_h, h, tables, p)
        return g_h, None, *gradients, *[None] * len(options), *g_norm, *[None] * len(norm)


@torch.compiler.allow_in_graph  # as in `eager_autograd`
def _width(*arguments: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = _Width.apply(*arguments)
    return results


def _kernels() -> ModuleType:
    from megatron_fc.connections.kernels import launch

    return launch


def _impl(h: Tensor, gamma: Tensor, fractions: int, *norm: Any) -> Tensor:
    x: Tensor = _kernels().given_width_forward(h.contiguous(), gamma, fractions, norm_of(norm))
    return x


def _fake(h: Tensor, gamma: Tensor, fractions: int, *_: Any) -> Tensor:
    slots = gamma.shape[1] // fractions
    return h.new_empty(*h.shape[:-1], h.shape[-1] // slots * fractions)


def _backward_impl(g_x: Any, g_mixed: Any, h: Tensor, *values: Any) -> list[Tensor]:
    gamma, alpha, fractions, *norm = values
    incoming = (contiguous(g_x), contiguous(g_mixed), h.contiguous())
    g_h, g_gamma, g_alpha, gradients = _kernels().given_width_backward(
        *incoming, gamma, alpha, fractions, norm_of(tuple(norm))
    )
    return [g_h, *present((g_gamma, g_alpha, gradients.weight, gradients.bias))]


def _backward_fake(g_x: Any, g_mixed: Any, h: Tensor, *values: Any) -> list[Tensor]:
    gamma, alpha, _, weight, bias, *_ = values
    of_x = (gamma, weight, bias) if g_x is not None else (None, None, None)
    like = present((of_x[0], None if g_mixed is None else alpha, *of_x[1:]))
    return [torch.empty_like(h, memory_format=torch.contiguous_format), *map(torch.empty_like, like)]


_given_width = define("given_width", f"(Tensor h, Tensor gamma, int fractions, {NORM}) -> Tensor", _impl, _fake)
_given_width_backward = define(
    "given_width_backward",
    f"(Tensor? g_x, Tensor? g_mixed, Tensor h, Tensor gamma, Tensor alpha, int fractions, {NORM}) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
