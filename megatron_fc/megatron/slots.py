"""The two modules that carry a connection in a Megatron layer's spec.

A layer computes `x = norm(h); o = sub_layer(x); h = bias_dropout_add(o, h)`. `NormSlot` stands in the norm slot
and owns the site; `AddSlot` stands in the bias-dropout-add slot and refers to it.

The norm slot returns x and h, as Megatron's layers allow, and leaves for its depth connection what that can take over.
With the fused kernels the depth connection of a sub-layer also makes the next one's input in the same pass, and leaves
it for that norm slot. Neither is needed: a slot that finds nothing left for the very value that it is given
(recomputed, detached, sent, written to, out of a CUDA graph) computes from the tensor itself, with the same result.
Modules that somebody observes by hooks of his own hand over nothing: they take a tensor and return one.

Which sub-layer comes next is known inside a layer when it is built. From one layer to the next it shows when a stream
arrives as the very object that the layer before returned, both with gradients: so never across the border of a pipeline
stage, of a recomputed region or of a sharded module, where it is another object or was computed without gradients.

A stream that is wider than the model begins where the first sub-layer meets the model's width (`stream`).

Slots that recompute the stream (`stream_layers`) also leave each other how it came about (`stream_recompute`). Where
that is lost, the stream is kept.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.handover import Handover
from megatron_fc.connections.norm import HandsOutWeights
from megatron_fc.connections.observers import observed
from megatron_fc.connections.ops import Prepared
from megatron_fc.connections.parcel import Parcel
from megatron_fc.connections.site import PendingDepth, biased
from megatron_fc.connections.stream_recompute import Link, Written
from megatron_fc.errors import UserError
from megatron_fc.megatron.norm_after import normed
from megatron_fc.megatron.norms import hand_out_weights
from megatron_fc.megatron.output_projections import announce_unscaled
from megatron_fc.megatron.own_parameters import mark_parameters, network_seed, without_drawing
from megatron_fc.megatron.plain_names import TakesPlainNames
from megatron_fc.megatron.refusals import CAPTURE_LAYERS, refuse_unsupported_config
from megatron_fc.megatron.stream import StreamBorder
from megatron_fc.megatron.versions import check_norm_protocol, norms_declare_residual


class Pairing:
    """Hands a site from its norm slot to its bias-dropout-add slot while Megatron builds a layer, in that order.

    One spec builds many layers, one after another, so one pairing serves all of them.

    Args:
        slot: name of the norm slot.
        place: number of the sub-layer in its layer, from 0, and how many the layer has.
        before: pairing of the sub-layer before it in the same layer.
        returns_stream: the layer takes (x, h) from its norm slot, not x alone.
    """

    def __init__(
        self,
        slot: str,
        place: tuple[int, int] = (0, 1),
        before: "Pairing | None" = None,
        returns_stream: bool = True,
    ) -> None:
        self.slot = slot
        self.place = place
        self.returns_stream = returns_stream
        self._before = before
        self._waiting: NormSlot | None = None
        self._built: AddSlot | None = None

    def offer(self, norm: "NormSlot") -> None:
        """Called by a norm slot when it is built."""
        self._waiting = norm
        if self._before is not None and self._before._built is not None:
            self._before._built.followed_by(norm)
            self._before._built = None

    def take(self, add: "AddSlot") -> "NormSlot":
        """Called by the bias-dropout-add slot when it is built.

        Raises:
            UserError: no norm slot was built before.
        """
        norm, self._waiting, self._built = self._waiting, None, add
        if norm is None:
            raise UserError(
                f"the width connection of {self.slot!r} was replaced after connect: call connect last, "
                f"and turn mla_down_proj_fusion off, which overwrites that slot in hybrid stacks"
            )
        return norm


class NormSlot(TakesPlainNames, MegatronModule):
    """Norm slot: width connection, then the norm that stood in the slot (Identity where TE fuses it).

    Args:
        norm: builder of the slot's own norm.
        connection: options of the connection.
        pairing: shared with the `AddSlot` of the same sub-layer.
        exchanges_shapes: let pipeline stages exchange the shape of a wider stream, since nobody widens their buffers.

    Raises:
        UserError: the number of fractions does not divide the hidden size, or an option of Megatron does not go with
            the connections.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        norm: LayerNormBuilder,
        connection: ConnectionConfig,
        pairing: Pairing,
        exchanges_shapes: bool = False,
    ) -> None:
        super().__init__(config=config)
        check_norm_protocol()
        refuse_unsupported_config(config, connection)
        announce_unscaled(config, connection)
        with without_drawing():
            self.connection: Any = connection.build(hidden_size)
        mark_parameters(self.connection, config)
        self.stream = StreamBorder(connection, config, exchanges_shapes)
        self.norm = hand_out_weights(norm(config=config, hidden_size=hidden_size, eps=eps))
        self.paired = False
        self.handover: Parcel[Handover] = Parcel()
        self.prepared: Parcel[Prepared] = Parcel()
        self.link: Parcel[Link] = Parcel()
        self._begins_layer = pairing.place[0] == 0
        # Whether the layer ran with gradients last. Not seen inside selective recompute, which turns them off.
        self.differentiates: bool | None = None
        self._recomputed = config.recompute_granularity == "selective" and "layernorm" in (
            config.recompute_modules or ()
        )
        # A layer captured on its own would compute the next one's input in vain: it is no output of the graph.
        self.learns_predecessor = config.cuda_graph_impl not in CAPTURE_LAYERS
        # Selective recompute frees the storage of all that the norm slot returns, and h must outlive it.
        self.hands_over = pairing.returns_stream and not self._recomputed
        self._place: tuple[int, int] | None = pairing.place
        pairing.offer(self)

    def meet_layer(self, layer: Any, name: str) -> None:
        """Set the initial values of the sub-layer that this turns out to be, once."""
        super().meet_layer(layer, name)
        if self._place is None or not hasattr(layer, "layer_number"):
            return
        (place, sub_layers), self._place = self._place, None
        is_first = place == 0 and (layer.layer_number == 1 or bool(getattr(layer, "is_mtp_layer", False)))
        self.stream.enters = is_first
        self.connection.place((layer.layer_number - 1) * sub_layers + place, network_seed())

    @property
    def returns_residual(self) -> bool:
        """Whether `forward` returns (x, h): asked by Megatron 0.20 when it builds the layer; 0.19 sees the tuple."""
        return self.hands_over

    def forward(self, h: Tensor) -> Any:
        """Residual stream [s, b, r*d] -> normed input of the sub-layer [s, b, d], and the stream if the layer takes it.

        The first one takes [s, b, d].

        Observers are shown x alone, as of any norm, where the layer does not insist on what was declared.
        """
        if not self.paired:
            raise UserError("the depth connection of this layer was replaced after connect: call it last")
        site, gradients = self.connection, torch.is_grad_enabled()
        if not self._recomputed:
            self.differentiates = gradients
        before, prepared = _returned.take(h), self.prepared.take(h)
        h = self.stream.entered(h)
        if before is not None and self.learns_predecessor and gradients:
            before.followed_by(self)
        hand_over = self.is_handing_over
        link = self._link(h) if gradients and site.config.stream_layers else None
        if link is not None:
            x, handover = link.width(h)
        elif not hand_over:
            x, handover = self.norm(site(h)) if observed(site) else site(h, self.norm), None
        elif prepared is None:
            x, handover = site(h, self.norm, hand_over=True)
        else:
            x, handover = site(h, self.norm, hand_over=True, prepared=prepared)
        if hand_over and handover is not None:
            # For a view, since a handover keeps h itself alive.
            h = h.view_as(h)
            self.handover.leave(h, handover)
        if link is not None and link.describes(h):  # no hook of the site or norm has written to it
            self.link.leave(h, link)
        return (x, h) if hand_over or (self.hands_over and norms_declare_residual()) else x

    def _link(self, h: Tensor) -> Link:
        """What backward is given in place of h."""
        return Link(self.connection, self.norm, h, _written.take(h), self._begins_layer)

    @property
    def is_handing_over(self) -> bool:
        """Whether h is returned as what the depth connection knows again: not where somebody looks."""
        return self.hands_over and not observed(self, self.connection)

    @property
    def takes_boundary(self) -> bool:
        """Whether the kernels can make this slot's result along with the stream."""
        kernels_can = self.connection.makes_boundaries and isinstance(self.norm, (IdentityOp, HandsOutWeights))
        return kernels_can and self.is_handing_over and not observed(self.norm)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            # Asked for by what exports a norm slot as a norm, as ModelOpt does, and would leave the connection behind.
            raise NotANorm(
                "this norm slot carries a connection, which other formats cannot hold: keep Megatron's "
                "checkpoint, or export a model trained with plain residuals"
            )
        return super().__getattr__(name)


class NotANorm(UserError, AttributeError):
    """A norm's attribute that its slot does not have; an `AttributeError`, so that `hasattr` and `inspect` go on."""


class AddSlot(nn.Module):
    """Bias-dropout-add slot: adds bias, applies dropout, then the depth connection.

    Args:
        pairing: shared with the `NormSlot` of the same sub-layer.
        norm_after: builder of a norm of what the sub-layer returns, None where its input is normed.
    """

    def __init__(self, pairing: Pairing, norm_after: LayerNormBuilder | None = None) -> None:
        super().__init__()
        norm = pairing.take(self)
        norm.paired = True
        self.norm_after: Any = None
        if norm_after is not None:
            config = norm.config
            self.norm_after = norm_after(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        # In tuples, so that the parameters are registered once, in the norm slots.
        self._norm = (norm,)
        self._following: tuple[NormSlot, ...] = ()

    def followed_by(self, norm: NormSlot) -> None:
        """Told whose width connection comes next, on the stream that this slot returns."""
        if norm.hands_over and norm.connection.config == self._norm[0].connection.config:
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
        dropout = dropout if training else 0.0
        [norm] = self._norm
        h = norm.stream.entered(h)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._gradients_are_on(training, o, h)):
            if self.norm_after is not None:
                o, bias = normed(self.norm_after, o_with_bias), None
            handover, link = norm.handover.take(h), norm.link.take(h)
            kernels = handover if handover is not None and handover.backend == "triton" else None
            if kernels is not None and link is None and self._following and self._in_one_pass():
                [following] = self._following
                pending = PendingDepth(o, h, kernels, bias, dropout)
                # The connection itself is called, since the slot has no parameters whose gathers wait for its call.
                stream, prepared = following.connection(pending, following.norm)
                following.prepared.leave(stream, prepared)
            elif link is not None:
                o = biased(o, h, bias, dropout)
                # A depth connection that was handed nothing looks at h again.
                with link.in_place_of(h) if handover is None else nullcontext():
                    stream = norm.connection.depth(o, h, handover)
                _written.leave(stream, link.written(o))
            else:
                stream = norm.connection.depth(o, h, handover, bias, dropout)
        if kernels is not None and stream.requires_grad:
            _returned.leave(stream, self)
        return stream

    def _in_one_pass(self) -> bool:
        """Whether the kernels can make the next sub-layer's input along with the stream."""
        return not self._norm[0].connection.config.recompute and self._following[0].takes_boundary

    def _gradients_are_on(self, training: bool, o: Tensor, h: Tensor) -> bool:
        """Whether the layer runs with gradients.

        Megatron enables them around this slot in any case, under no_grad too: in an evaluation, in the first pass of
        full recompute. The stock sum keeps nothing there; the depth connection would, and tie its layers into one
        graph. The norm slot saw whether they were on. Where it could not, they are kept in doubt: a sub-layer may have
        been left out, whose output then says nothing.
        """
        [norm] = self._norm
        if o.requires_grad or norm.differentiates is not None:
            return o.requires_grad or bool(norm.differentiates)
        return training and (h.requires_grad or any(p.requires_grad for p in norm.connection.parameters()))

    def __getstate__(self) -> dict[str, Any]:
        """Without the layer that follows, which a copy or a pickle of this one alone would take along."""
        return {**super().__getstate__(), "_following": ()}


# By whom a stream was returned, of the one that was returned last.
_returned: Parcel[AddSlot] = Parcel()
# And how it came about, where the next site recomputes it.
_written: Parcel[Written] = Parcel()
