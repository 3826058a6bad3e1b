"""The two modules that carry a Frac-Connection in a Megatron layer's spec.

A layer computes `x = norm(h); o = sub_layer(x); h = bias_dropout_add(o, h)`. `FracNorm` stands in the norm slot
and owns the site; `FracAdd` stands in the bias-dropout-add slot and refers to it. Both are pure functions of h:
nothing is kept between them, so recompute, pipeline schedules and CUDA graphs see an ordinary layer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fc.config import FracConfig
from megatron_fc.connection import FracConnection
from megatron_fc.errors import UserError
from megatron_fc.megatron.refusals import refuse_unsupported_config


class Pairing:
    """Hands a site from its norm slot to its bias-dropout-add slot while Megatron builds a layer, in that order.

    One spec builds many layers, one after another, so one pairing serves all of them.
    """

    def __init__(self, slot: str) -> None:
        self.slot = slot
        self._waiting: FracNorm | None = None

    def offer(self, norm: "FracNorm") -> None:
        """Called by a norm slot when it is built."""
        self._waiting = norm

    def take(self) -> "FracNorm":
        """Called by the bias-dropout-add slot when it is built.

        Raises:
            UserError: no norm slot was built before.
        """
        norm, self._waiting = self._waiting, None
        if norm is None:
            raise UserError(
                f"the width connection of {self.slot!r} was replaced after frac_connect: call frac_connect last, "
                f"and turn mla_down_proj_fusion off, which overwrites that slot in hybrid stacks"
            )
        return norm


class FracNorm(MegatronModule):
    """Norm slot: width connection, then the norm that stood in the slot (Identity where TE fuses it).

    Args:
        norm: builder of the slot's own norm.
        frac: options of the connection.
        pairing: shared with the `FracAdd` of the same sub-layer.

    Raises:
        UserError: the rate does not divide the hidden size, or an option of Megatron does not go with FC.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        norm: LayerNormBuilder,
        frac: FracConfig,
        pairing: Pairing,
    ) -> None:
        super().__init__(config=config)
        refuse_unsupported_config(config)
        self.connection = FracConnection(hidden_size, frac)
        for parameter in self.connection.parameters():
            # Under sequence parallelism every rank sees its tokens only: Megatron then sums these gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.norm = norm(config=config, hidden_size=hidden_size, eps=eps)
        self.paired = False
        pairing.offer(self)

    def forward(self, h: Tensor) -> Tensor:
        """Residual stream [s, b, d] -> normed input of the sub-layer [s, b, d]."""
        if not self.paired:
            raise UserError("the depth connection of this layer was replaced after frac_connect: call it last")
        return self.connection(h, then=self.norm)


class FracAdd(nn.Module):
    """Bias-dropout-add slot: adds bias, applies dropout, then the depth connection."""

    def __init__(self, pairing: Pairing) -> None:
        super().__init__()
        norm = pairing.take()
        norm.paired = True
        # In a tuple, so that the parameters are registered once, in the norm slot.
        self._site = (norm.connection,)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that Megatron calls with ((o, bias), h, dropout probability).

        `fused` asks for a jit-compiled stock operation; there is one implementation here, whichever it says.
        """
        return partial(self._bias_dropout_depth, training)

    def _bias_dropout_depth(
        self, training: bool, o_with_bias: tuple[Tensor, Tensor | None], h: Tensor, dropout: float
    ) -> Tensor:
        o, bias = o_with_bias
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._gradients_are_on(o, h)):
            # Bias and dropout round in the same dtype as Megatron's own operation, hence the identity at step 0.
            o = o.to(h.dtype)
            if bias is not None:
                o = o + bias.to(h.dtype)
            return self._site[0].depth(F.dropout(o, p=dropout, training=training), h)

    def _gradients_are_on(self, o: Tensor, h: Tensor) -> bool:
        """Whether the layer runs with gradients.

        Megatron enables them around this slot in any case, under no_grad too: in an evaluation, in the first pass of
        full recompute. The stock sum keeps nothing there; the depth connection would, and tie its layers into one
        graph. The sub-layer's output depends on h and gamma and so says how it was computed.
        """
        return o.requires_grad or not (h.requires_grad or self._site[0].static_gamma.requires_grad)
