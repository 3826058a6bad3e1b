"""Norm-after, as OLMo2 has it: h + norm(F(h)) in place of h + F(norm(h)); the norm lies in the bias-dropout-add slot.

The norm slot is left empty. It notes what the bias-dropout-add slot cannot see: Megatron enables gradients around that
one in any case, and a norm with weights would tie the layers of an evaluation into one graph.

In checkpoints the norm is `self_attn_bda.norm_after` or `mlp_bda.norm_after`, with connections too: so a model that
norms before its sub-layers never loads one that norms behind them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fc.errors import UserError


class NormPlace:
    """Hands an `EmptyNormSlot` to the `NormedAdd` of the same sub-layer while Megatron builds a layer, in that order.

    One spec builds many layers, one after another, so one place serves all of them.
    """

    waiting: "EmptyNormSlot | None" = None

    def take(self) -> "EmptyNormSlot":
        slot, self.waiting = self.waiting, None
        if slot is None:
            raise UserError("the norm slot of a sub-layer with norm_after was replaced: set norm_after last")
        return slot


class EmptyNormSlot(IdentityOp):
    """A norm slot that returns what it is given, [s, b, d], and notes whether gradients are on."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, place: NormPlace) -> None:
        super().__init__()
        self.differentiates = True
        self.norm_options = {"config": config, "hidden_size": hidden_size, "eps": eps}
        place.waiting = self

    def forward(self, h: Tensor) -> Tensor:
        self.differentiates = torch.is_grad_enabled()
        return h


class NormedAdd(nn.Module):
    """Bias-dropout-add slot: norms what the sub-layer returns, then adds as Megatron does.

    Args:
        norm: builder of the norm that stood in the norm slot.
        place: shared with the norm slot.
    """

    def __init__(self, norm: LayerNormBuilder, place: NormPlace) -> None:
        super().__init__()
        slot = place.take()
        self._slot = (slot,)  # in a tuple, so that it is registered once, in its layer
        self.norm_after: Any = norm(**slot.norm_options)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that Megatron calls with ((o, bias), h, dropout probability)."""
        return partial(self._norm_and_add, get_bias_dropout_add(training, fused))

    def _norm_and_add(
        self, add: Callable[..., Tensor], o_with_bias: tuple[Tensor, Tensor | None], h: Tensor, dropout: float
    ) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._slot[0].differentiates):
            return add((normed(self.norm_after, o_with_bias), None), h, dropout)


def normed(norm: nn.Module, o_with_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    """Norm a sub-layer's output [s, b, d], its bias included."""
    o, bias = o_with_bias
    result: Tensor = norm(o if bias is None else o + bias)
    return result
