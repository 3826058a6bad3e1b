"""The torch backend under autograd: the functions of `megatron_fc.connections.eager` as the two operations of a site.

Functions of autograd, not custom operations, which cost twice the Python: a small model on a CPU waits for that.

For backward are kept: h (width), o and beta (depth); the coefficients gamma and alpha are computed again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fc.connections import eager
from megatron_fc.connections.handover import Handover, without_storage
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.once import differentiated_once
from megatron_fc.connections.operands import AnyOperands, ManifoldOperands, Operands
from megatron_fc.connections.per_slot import PerSlotParameters


def width(h: Tensor, p: AnyOperands, want_x: bool = True) -> tuple[Tensor, Handover]:
    """Width connection: x [..., d] (empty without want_x), and what the depth connection takes over."""
    operation = _width_per_slot if isinstance(p, Operands) else _width_on_manifold
    x, beta, alpha, mixed = operation(h, want_x, *p)
    return x, Handover(beta, alpha, mixed, "torch")


def depth(o: Tensor, h: Tensor, handover: Handover) -> Tensor:
    """Depth connection: the next stream [..., n*c] in the dtype of h."""
    return _depth(o, h, *handover.tensors)


def _width_of(kind: Any, parameters: int) -> Callable[..., tuple[Tensor, ...]]:
    """The operation for one kind of operands, the first of which are its parameters."""

    class Width(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, want_x: bool, *operands: Any) -> tuple[Tensor, ...]:
            x, beta, alpha = eager.width_forward(h, kind(*operands), want_x)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(alpha)
            ctx.save_for_backward(h, *operands[:parameters])
            ctx.options = operands[parameters:]
            return h.new_empty(0) if x is None else x, beta, alpha, without_storage(h)

        @staticmethod
        @differentiated_once
        def backward(
            ctx: Any, g_x: Tensor | None, g_beta: Tensor | None, _: Tensor | None, g_mixed: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            h, *p = ctx.saved_tensors
            if g_x is not None and not g_x.shape[-1]:
                g_x = None
            g_h, gradients = eager.width_backward(g_x, g_beta, g_mixed, h, kind(*p, *ctx.options))
            return g_h, None, *gradients, *[None] * len(ctx.options)

    # torch.compile is to leave it whole until it differentiates: in a forward function that it looks into, torch 2.11
    # loses the gradient of what an operation changes in place.
    @torch.compiler.allow_in_graph
    def width(*arguments: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = Width.apply(*arguments)
        return results

    return width


_width_per_slot = _width_of(Operands, len(PerSlotParameters._fields))
_width_on_manifold = _width_of(ManifoldOperands, len(ManifoldParameters._fields))


class _Depth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor, mixed: Tensor) -> Tensor:
        ctx.save_for_backward(o, beta)
        return eager.depth_forward(o, h, beta, alpha)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        o, beta = ctx.saved_tensors
        g_o, g_beta = eager.depth_backward(g, o, beta)
        return g_o, None, g_beta, None, g


@torch.compiler.allow_in_graph  # as above
def _depth(*arguments: Any) -> Tensor:
    following: Tensor = _Depth.apply(*arguments)
    return following
