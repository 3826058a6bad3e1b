"""FracConnection: the parameters of one site and its two operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections import eager_autograd, ops
from megatron_fc.connections.backend import choose_backend
from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.handover import Handover
from megatron_fc.connections.norm import NormWeights, norm_weights
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.ops import Prepared
from megatron_fc.connections.per_slot import PerSlotParameters, set_initial_values
from megatron_fc.connections.recompute import recomputed
from megatron_fc.connections.site import Site, check_dropout


class PendingDepth(NamedTuple):
    """A depth connection still to be made, as `FracConnection.depth` takes it."""

    o: Tensor
    h: Tensor
    handover: Handover
    bias: Tensor | None = None
    dropout: float = 0.0


class FracConnection(Site):
    """One Frac-Connection site: the width connection before a sub-layer, the depth connection after it.

    A `megatron_fc.connections.base.Connection`::

        x = fc(h)            # the sub-layer's input; fc.width(h) is the same
        h = fc.depth(o, h)   # the next residual stream, o being the sub-layer's output

    The parameters are those of arXiv 2503.14125 section 3; at their initial values the site is a plain residual
    connection to the bit. Statics, scales and the norm's weight are one-dimensional and `dynamic_weight` is
    two-dimensional, which gives them the paper's weight decay under Megatron's rule.

    Args:
        hidden_size: width d of the residual stream.
        config: the options.

    Raises:
        UserError: the rate does not divide the hidden size.
    """

    config: FracConfig

    def __init__(self, hidden_size: int, config: FracConfig) -> None:
        super().__init__(hidden_size, config)

    def reset_parameters(self) -> None:
        """Set the initial values: B = 1, Y = A = I, W = 0, s = initial_scale (eq. 15)."""
        with torch.no_grad():
            set_initial_values(self.site_parameters(), self.config)

    def site_parameters(self) -> PerSlotParameters:
        """Return the parameters by name, None for those that the configuration does not have."""
        return PerSlotParameters(**{name: getattr(self, name) for name in PerSlotParameters._fields})

    def operands(self) -> Operands:
        """Return the site as the operations take it."""
        return Operands.of(self.site_parameters(), self.config)

    def forward(
        self,
        h: "Tensor | PendingDepth",
        norm: Callable[[Tensor], Tensor] | None = None,
        hand_over: bool = False,
        prepared: Prepared | None = None,
    ) -> Any:
        """Width connection: residual stream [..., d] -> sub-layer input [..., d].

        Frameworks call the module, never `width` alone: hooks on the module (overlapped parameter gathers of
        data parallelism) have then run before the parameters are read.

        Args:
            h: the residual stream; or the depth connection that is to make it, in the same pass (Triton).
            norm: the sub-layer's norm, applied to the result: in the same pass where it hands out its weights and a
                kernel can apply them, else called; with `recompute` its input is not kept for backward.
            hand_over: also return what `depth` can take over instead of looking at h again.
            prepared: what a `PendingDepth` that made h has prepared.

        Returns:
            x; with `hand_over` (x, handover); for a `PendingDepth` (h, prepared).

        Raises:
            UserError: the last dimension is not the hidden size or not contiguous, a parameter has 16 bits, or the
                backend cannot run.
        """
        if isinstance(h, PendingDepth):
            return self._boundary(h, norm)
        self._check_stream(h)
        backend = choose_backend(self.config, h)
        weights = norm_weights(norm, h) if backend == "triton" else None
        behind = norm if weights is None else None

        def width(h: Tensor, prepared: Prepared | None = None) -> tuple[Tensor, Handover]:
            x, handover = self._width(h, backend, weights, prepared)
            return x if behind is None else behind(x), handover

        x, handover = recomputed(width, h) if self.config.recompute else width(h, prepared)
        return (x, handover) if hand_over else x

    def _width(
        self,
        h: Tensor,
        backend: str,
        norm: NormWeights | None = None,
        prepared: Prepared | None = None,
        want_x: bool = True,
    ) -> tuple[Tensor, Handover]:
        p = self.operands()
        if backend == "torch":
            return eager_autograd.width(h, p, want_x)
        made = None if prepared is None else ops.frac_prepared_width(h, prepared, p, norm)
        return ops.frac_width(h, p, norm, want_x) if made is None else made

    def _boundary(self, pending: "PendingDepth", norm: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Prepared]:
        o, h, handover, bias, dropout = pending
        self._check_stream(h)
        self._check_output(o, h)
        weights, seed = norm_weights(norm, h), dropout_seed(h, dropout)
        return ops.frac_boundary(o, h, handover, bias, seed, dropout, self.operands(), weights)

    def _handover(self, h: Tensor) -> Handover:
        return self._width(h, choose_backend(self.config, h), want_x=False)[1]

    def _depth(self, o: Tensor, h: Tensor, handover: Handover, bias: Tensor | None, dropout: float) -> Tensor:
        if handover.backend == "triton":
            return ops.frac_depth(o, h, handover, bias, dropout_seed(h, dropout), dropout)
        return super()._depth(o, h, handover, bias, dropout)


def dropout_seed(h: Tensor, dropout: float) -> Tensor | None:
    """Draw a seed from the device's generator: without waiting for it, and again where its state is restored."""
    check_dropout(dropout)
    return torch.randint(2**31 - 1, (1,), device=h.device) if dropout > 0 else None
