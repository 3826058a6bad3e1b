"""Site: what the modules of all kinds have in common, and how they run, on the kernels or on torch operations."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from megatron_fc.connections import eager_autograd, ends, ops, ops_on_manifold
from megatron_fc.connections.backend import choose_backend
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.fp32 import Fp32Parameters
from megatron_fc.connections.handover import Handover
from megatron_fc.connections.norm import NormWeights, norm_weights
from megatron_fc.connections.operands import AnyOperands, Operands
from megatron_fc.connections.ops import Prepared
from megatron_fc.connections.recompute import recomputed
from megatron_fc.errors import UserError


class PendingDepth(NamedTuple):
    """A depth connection still to be made, as `Site.depth` takes it."""

    o: Tensor
    h: Tensor
    handover: Handover
    bias: Tensor | None = None
    dropout: float = 0.0


class Site(Fp32Parameters, ABC):
    """One site, a `megatron_fc.connections.base.Connection`. A kind adds its initial values and its operands.

    Args:
        hidden_size: width d of a sub-layer's input and output.
        config: the options.
        sub_layer: number of the sub-layer in the network, from 0.

    Attributes:
        seed: of the random initial values; None draws them from torch's own generator.
        makes_boundaries: the kernels can make the stream that a site is given along with its result.

    Raises:
        UserError: the number of fractions does not divide the hidden size.
    """

    makes_boundaries: ClassVar[bool] = True

    def __init__(self, hidden_size: int, config: ConnectionConfig, sub_layer: int = 0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.sub_layer = sub_layer
        self.seed: int | None = None
        self.stream_width = config.stream_width(hidden_size)
        self.register_parameters(config.parameter_names, config.parameter_shapes(hidden_size))
        self.reset_parameters()

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set the initial values."""

    @abstractmethod
    def operands(self) -> AnyOperands:
        """Return the site as the operations take it."""

    def place(self, sub_layer: int, seed: int) -> None:
        """Set the initial values of one sub-layer of a network.

        What a site draws is its own: all other weights of a network start alike, whatever its connections are.

        Args:
            sub_layer: its number, from 0.
            seed: of the network.
        """
        self.sub_layer, self.seed = sub_layer, hash((seed, sub_layer)) % 2**63
        self.reset_parameters()

    def start_as_residual(self) -> None:
        """Set initial values at which the network is the residual one with the same weights, for upcycling.

        Raises:
            UserError: as `ConnectionConfig.refuse_residual_start`.
        """
        self.reset_parameters()

    def enter(self, h: Tensor) -> Tensor:
        """The stream of an embedding, [..., d] -> [..., n*c]."""
        return ends.enter(h, self.config)

    def leave(self, h: Tensor) -> Tensor:
        """What the last norm takes, [..., n*c] -> [..., d].

        Raises:
            UserError: the network has a learned leave.
        """
        if self.config.leave_shapes(self.hidden_size):
            raise UserError("the learned leave belongs to the network, not to a site: use config.build_leave()")
        return ends.mean(h, self.config)

    def forward(
        self,
        h: "Tensor | PendingDepth",
        norm: Callable[[Tensor], Tensor] | None = None,
        hand_over: bool = False,
        prepared: Prepared | None = None,
    ) -> Any:
        """Width connection: stream [..., n*c] -> sub-layer input [..., d].

        Frameworks call the module, never `width` alone: hooks on the module (overlapped parameter gathers of
        data parallelism) have then run before the parameters are read.

        Args:
            h: the stream; or the depth connection that is to make it, in the same pass (`makes_boundaries`).
            norm: the sub-layer's norm, applied to the result: in the same pass where it hands out its weights and a
                kernel can apply them, else called; with `recompute` its input is not kept for backward.
            hand_over: also return what `depth` can take over instead of looking at h again.
            prepared: what a `PendingDepth` that made h has prepared.

        Returns:
            x; with `hand_over` (x, handover); for a `PendingDepth` (h, prepared).

        Raises:
            UserError: the last dimension is not the stream's width or not contiguous, a parameter has 16 bits, or the
                backend cannot run.
        """
        if isinstance(h, PendingDepth):
            return self._boundary(h, norm)
        self._check_stream(h)
        backend = choose_backend(self.config, h)
        weights = norm_weights(norm, h) if backend == "triton" else None
        if backend == "triton":
            _refuse_forward_mode(h)
        if weights is not None:
            _check_width("the norm's weight", weights.weight, self.hidden_size, "hidden_size")
        behind = norm if weights is None else None

        def width(h: Tensor, prepared: Prepared | None = None) -> tuple[Tensor, Handover]:
            x, handover = self._width(h, backend, weights, prepared)
            return x if behind is None else behind(x), handover

        x, handover = recomputed(width, h) if self.config.recompute else width(h, prepared)
        return (x, handover) if hand_over else x

    def takes_norm(self, norm: Callable[[Tensor], Tensor], h: Tensor) -> bool:
        """Whether `forward` makes no x to apply a norm to, but applies it in the same pass."""
        return choose_backend(self.config, h) == "triton" and norm_weights(norm, h) is not None

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
        if not isinstance(p, Operands):
            return ops_on_manifold.width(h, p, norm, want_x)
        made = None if prepared is None else ops.prepared_width(h, prepared, p, norm)
        return ops.width(h, p, norm, want_x) if made is None else made

    def _boundary(self, pending: PendingDepth, norm: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Prepared]:
        o, h, handover, bias, dropout = pending
        self._check_stream(h)
        self._check_output(o, h)
        p = self.operands()
        assert isinstance(p, Operands)
        return ops.boundary(o, h, handover, bias, dropout_seed(h, dropout), dropout, p, norm_weights(norm, h))

    def width(self, h: Tensor) -> Tensor:
        """The width connection; the same as calling the module."""
        x: Tensor = self(h)
        return x

    def depth(
        self,
        o: Tensor,
        h: Tensor,
        handover: Handover | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Depth connection: sub-layer output [..., d] and stream [..., n*c] -> next stream [..., n*c].

        Args:
            o: the sub-layer's output, in the dtype of h or, with an fp32 stream, a lower one.
            h: the stream that went into the width connection.
            handover: what the width connection handed over for h; without it the coefficients are computed again.
            bias: [d], added to o; rounded like Megatron's own bias-dropout-add.
            dropout: probability for an element of o to be dropped, before it is written to slots.

        Returns:
            [..., n*c] in the dtype of h.

        Raises:
            UserError: shapes or dtypes do not fit, or the backend cannot run.
        """
        self._check_stream(h)
        self._check_output(o, h)
        if bias is not None:
            _check_width("bias", bias, self.hidden_size, "hidden_size")
        if handover is not None and handover.mixed.shape != h.shape:
            raise UserError(
                f"the handover is of a stream of shape {tuple(handover.mixed.shape)}, h has {tuple(h.shape)}"
            )
        return self._depth(o, h, self._handover(h) if handover is None else handover, bias, dropout)

    def _handover(self, h: Tensor) -> Handover:
        """What the width connection hands over, without its x."""
        return self._width(h, choose_backend(self.config, h), want_x=False)[1]

    def _depth(self, o: Tensor, h: Tensor, handover: Handover, bias: Tensor | None, dropout: float) -> Tensor:
        if handover.backend == "triton":
            return ops.depth(o, h, handover, bias, dropout_seed(h, dropout), dropout)
        return eager_autograd.depth(biased(o, h, bias, dropout), h, handover)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, {self.config}"

    def _check_stream(self, h: Tensor) -> None:
        what = "hidden_size" if self.stream_width == self.hidden_size else "the width of the stream"
        _check("h", h, self.stream_width, what)

    def _check_output(self, o: Tensor, h: Tensor) -> None:
        if o.shape[:-1] != h.shape[:-1] or (self.stream_width == self.hidden_size and o.shape != h.shape):
            raise UserError(
                f"o has shape {tuple(o.shape)} and h {tuple(h.shape)}: they must be the same"
                f"{'' if self.stream_width == self.hidden_size else ' but for the last dimension'}"
            )
        _check("o", o, self.hidden_size, "hidden_size")
        if o.dtype != h.dtype and not (h.dtype == torch.float32 and o.dtype in (torch.bfloat16, torch.float16)):
            raise UserError(f"o is {o.dtype} and h {h.dtype}: they must be the same, or o of 16 bits with h in fp32")


def biased(o: Tensor, h: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """A sub-layer's output with its bias [d] and dropout, rounded like Megatron's own bias-dropout-add."""
    if bias is None and not dropout:
        return o
    check_dropout(dropout)
    o = o.to(h.dtype) if bias is None else o.to(h.dtype) + bias.to(h.dtype)
    return F.dropout(o, dropout)


def dropout_seed(h: Tensor, dropout: float) -> Tensor | None:
    """Draw a seed from the device's generator: without waiting for it, and again where its state is restored."""
    check_dropout(dropout)
    return torch.randint(2**31 - 1, (1,), device=h.device) if dropout > 0 else None


def _refuse_forward_mode(h: Tensor) -> None:
    """Check that no tangent comes in, of which a custom operation would lose sight.

    Raises:
        UserError: one does.
    """
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(h).tangent is not None:
        raise UserError("the kernels have no forward-mode derivative, as of torch.func.jvp: differentiate backward")


def check_dropout(dropout: float) -> None:
    """Check that it is a probability below 1.

    Raises:
        UserError: it is none.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout}: give a probability from 0 to below 1")


def _check_width(name: str, tensor: Tensor, width: int, what: str) -> None:
    if tensor.shape[-1:] != (width,):
        raise UserError(f"{name} has shape {tuple(tensor.shape)}: its last dimension must be {what}={width}")


def _check(name: str, tensor: Tensor, width: int, what: str) -> None:
    _check_width(name, tensor, width, what)
    if tensor.stride(-1) != 1 and width > 1:
        raise UserError(f"{name} has strides {tensor.stride()}: its last dimension must be contiguous")
