"""Backward passes by hand, which autograd cannot differentiate: a second derivative through one is an error."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_fc.errors import UserError


def differentiated_once(
    backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., tuple[Any, ...]]:
    """Wrap the backward pass of an operation, f(ctx, *gradients), of which everything in it is a constant to autograd.

    torch's own `once_differentiable` leaves out what depends on saved tensors alone, which would go missing silently.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # which create_graph=True turns on
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        refused: tuple[Any, ...] = _Refused.apply(
            *(None if g is None else g.detach().requires_grad_() for g in results)
        )
        return refused

    return run


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return tuple(None if g is None else g.detach() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise UserError(
            "a connection is differentiated by hand and once, a second derivative (create_graph=True) was asked for: "
            "leave the connections out of it, or compute it with megatron_fc.connections.reference"
        )
