"""The two modules that carry a Frac-Connection in a Megatron layer's spec.

A layer computes `x = norm(h); o = sub_layer(x); h = bias_dropout_add(o, h)`. `FracNorm` stands in the norm slot
and owns the site; `FracAdd` stands in the bias-dropout-add slot and refers to it.

The norm slot returns x and h, as Megatron's layers allow, and that very h carries what the depth connection can take
over from it. With the fused kernels the depth connection of a sub-layer also makes the next one's input in the same
pass, and the stream that it returns carries that. Neither is needed: a slot that finds a tensor which carries nothing
(recomputed, detached, sent, out of a CUDA graph) computes from the tensor itself, with the same result.

Which sub-layer comes next is known inside a layer when it is built. From one layer to the next it shows when a stream
arrives as the very object that the layer before returned, both with gradients: so never across the border of a pipeline
stage, of a recomputed region or of a sharded module, where it is another object or was computed without gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.frac import FracConnection, PendingDepth
from megatron_fc.connections.handover import Handover
from megatron_fc.connections.norm import HandsOutWeights
from megatron_fc.errors import UserError
from megatron_fc.megatron.norms import hand_out_weights
from megatron_fc.megatron.plain_names import TakesPlainNames
from megatron_fc.megatron.refusals import refuse_unsupported_config, training_args, uses_matrix_optimizer
from megatron_fc.megatron.versions import check_norm_protocol

_CARRIED, _RETURNED_BY = "_frac_carried", "_frac_returned_by"


class _Carried(NamedTuple):
    """Carried by a stream: for which site, the sub-layer's input if it is there already, and the handover."""

    site: FracConnection
    x: Tensor | None
    handover: Handover


def _load(stream: Tensor, carried: _Carried) -> Tensor:
    setattr(stream, _CARRIED, carried)
    return stream


def _unload(stream: Tensor, site: FracConnection) -> _Carried | None:
    """Take off a stream what it carries, so that it lives no longer than its use; None if it is not for this site."""
    carried: _Carried | None = stream.__dict__.pop(_CARRIED, None)
    return carried if carried is not None and carried.site is site else None


class Pairing:
    """Hands a site from its norm slot to its bias-dropout-add slot while Megatron builds a layer, in that order.

    One spec builds many layers, one after another, so one pairing serves all of them.

    Args:
        slot: name of the norm slot.
        before: pairing of the sub-layer before it in the same layer.
        returns_stream: the layer takes (x, h) from its norm slot, not x alone.
    """

    def __init__(self, slot: str, before: "Pairing | None" = None, returns_stream: bool = True) -> None:
        self.slot = slot
        self.returns_stream = returns_stream
        self._before = before
        self._waiting: FracNorm | None = None
        self._built: FracAdd | None = None

    def offer(self, norm: "FracNorm") -> None:
        """Called by a norm slot when it is built."""
        self._waiting = norm
        if self._before is not None and self._before._built is not None:
            self._before._built.followed_by(norm)
            self._before._built = None

    def take(self, add: "FracAdd") -> "FracNorm":
        """Called by the bias-dropout-add slot when it is built.

        Raises:
            UserError: no norm slot was built before.
        """
        norm, self._waiting, self._built = self._waiting, None, add
        if norm is None:
            raise UserError(
                f"the width connection of {self.slot!r} was replaced after frac_connect: call frac_connect last, "
                f"and turn mla_down_proj_fusion off, which overwrites that slot in hybrid stacks"
            )
        return norm


class FracNorm(TakesPlainNames, MegatronModule):
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
        check_norm_protocol()
        refuse_unsupported_config(config)
        self.connection = FracConnection(hidden_size, frac)
        for parameter in self.connection.parameters():
            # Under sequence parallelism every rank sees its tokens only: Megatron then sums these gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if frac.dynamic and uses_matrix_optimizer(training_args()):
            # Coefficients are no linear map to be orthogonalised: Muon leaves what is marked so to Adam.
            matrix = self.connection.get_parameter("dynamic_weight")
            matrix.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        self.norm = hand_out_weights(norm(config=config, hidden_size=hidden_size, eps=eps))
        self.paired = False
        # A layer captured on its own would compute the next one's input in vain: it is no output of the graph.
        self.learns_predecessor = config.cuda_graph_impl not in ("local", "transformer_engine")
        # Selective recompute frees the storage of all that the norm slot returns, and h must outlive it.
        self.hands_over = pairing.returns_stream and not (
            config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())
        )
        pairing.offer(self)

    @property
    def returns_residual(self) -> bool:
        """Whether `forward` returns (x, h): asked by Megatron 0.20 when it builds the layer; 0.19 sees the tuple."""
        return self.hands_over

    def forward(self, h: Tensor | PendingDepth) -> Any:
        """Residual stream [s, b, d] -> normed input of the sub-layer [s, b, d], and the stream if the layer takes it.

        Given a depth connection still to be made, makes both in one pass and returns the stream with x hanging on it.
        """
        if not self.paired:
            raise UserError("the depth connection of this layer was replaced after frac_connect: call it last")
        site = self.connection
        if isinstance(h, PendingDepth):
            stream, x, handover = site(h, self.norm)
            return _load(stream, _Carried(site, x, handover))
        carried, before = _unload(h, site), h.__dict__.pop(_RETURNED_BY, None)
        differentiates = torch.is_grad_enabled() and h.requires_grad
        if before is not None and self.learns_predecessor and differentiates:
            before.followed_by(self)
        if carried is not None and carried.x is not None and (carried.x.requires_grad or not differentiates):
            x, handover = carried.x, carried.handover
        elif not self.hands_over:
            return site(h, self.norm)
        else:
            x, handover = site(h, self.norm, hand_over=True)
        # A view, since a tensor that hung on h itself would keep h, and so itself, alive.
        return x, _load(h.view_as(h), _Carried(site, None, handover))

    @property
    def weight(self) -> Tensor:
        """Asked for by what exports a norm slot as a norm, as ModelOpt does, and would leave the connection behind."""
        raise UserError(
            "this norm slot carries a Frac-Connection, which other formats cannot hold: keep Megatron's checkpoint, or "
            "export a model trained with plain residuals"
        )


class FracAdd(nn.Module):
    """Bias-dropout-add slot: adds bias, applies dropout, then the depth connection."""

    def __init__(self, pairing: Pairing) -> None:
        super().__init__()
        norm = pairing.take(self)
        norm.paired = True
        # In tuples, so that the parameters are registered once, in the norm slots.
        self._site = (norm.connection,)
        self._following: tuple[FracNorm, ...] = ()

    def followed_by(self, norm: FracNorm) -> None:
        """Told whose width connection comes next, on the stream that this slot returns."""
        if norm.hands_over and norm.connection.config == self._site[0].config:
            self._following = (norm,)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that Megatron calls with ((o, bias), h, dropout probability).

        `fused` asks for a jit-compiled stock operation; there is one implementation here, whichever it says.
        """
        return partial(self._bias_dropout_depth, training)

    def _bias_dropout_depth(
        self, training: bool, o_with_bias: tuple[Tensor, Tensor | None], h: Tensor, dropout: float
    ) -> Tensor:
        o, bias = o_with_bias
        site, carried = self._site[0], _unload(h, self._site[0])
        handover = None if carried is None else carried.handover
        dropout = dropout if training else 0.0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._gradients_are_on(o, h)):
            if handover is not None and self._following and self._in_one_pass(handover):
                stream: Tensor = self._following[0](PendingDepth(o, h, handover, bias, dropout))
            else:
                stream = site.depth(o, h, handover, bias, dropout)
        if stream.requires_grad:
            setattr(stream, _RETURNED_BY, self)
        return stream

    def _in_one_pass(self, handover: Handover) -> bool:
        """Whether the kernels can make the next sub-layer's input along with the stream."""
        if handover.backend != "triton" or self._site[0].config.recompute:
            return False
        return isinstance(self._following[0].norm, (IdentityOp, HandsOutWeights))

    def _gradients_are_on(self, o: Tensor, h: Tensor) -> bool:
        """Whether the layer runs with gradients.

        Megatron enables them around this slot in any case, under no_grad too: in an evaluation, in the first pass of
        full recompute. The stock sum keeps nothing there; the depth connection would, and tie its layers into one
        graph. The sub-layer's output depends on h and gamma and so says how it was computed.
        """
        return o.requires_grad or not (h.requires_grad or self._site[0].static_gamma.requires_grad)
