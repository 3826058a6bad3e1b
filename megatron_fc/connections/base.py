"""The contract that every kind of connection meets: a configuration, and the modules that it builds. Loads no torch.

A stream of n slots of width c = d/m, flat as [..., n*c]; m is the number of fractions into which a sub-layer's input
and output are split. Frac-Connections have n = m, Hyper-Connections m = 1.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, get_args, get_origin

from megatron_fc.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ConnectionConfig(ABC):
    """Options of a connection, one frozen dataclass per kind.

    Attributes:
        kind: its name in the registry.
        parameter_names: of a site that has them all, in order.
        slots_option, fractions_option: names of the fields that set n and m.
        slots: n.
        fractions: m.
        label: short name as in the papers' tables, e.g. ``dfc_x4``.
    """

    kind: ClassVar[str]
    parameter_names: ClassVar[tuple[str, ...]]
    slots_option: ClassVar[str] = "slots"
    fractions_option: ClassVar[str] = "fractions"

    @property
    @abstractmethod
    def slots(self) -> int: ...

    @property
    @abstractmethod
    def fractions(self) -> int: ...

    @property
    @abstractmethod
    def label(self) -> str: ...

    @property
    def is_wide(self) -> bool:
        """Whether the stream is wider than the model, n > m: it has to be entered and left then."""
        return self.slots != self.fractions

    @property
    def stream_layers(self) -> int:
        """Layers that keep one stream together for backward; 0: every sub-layer keeps its own."""
        return 0

    @property
    def recompute(self) -> bool:
        """Whether a site keeps its stream and the sub-layer's output alone for backward."""
        return False

    @property
    @abstractmethod
    def backend(self) -> str:
        """What runs it: triton, torch, or auto."""

    @property
    def applies_norm(self) -> bool:
        """Whether the width connection is to apply a sub-layer's norm that a projection could apply, too.

        Inside a projection a norm keeps its input, which a kernel never writes and `stream_layers` is to spare.
        """
        return True

    @property
    def description(self) -> str:
        """The connections in words: the label, and what they do without although others of their kind have it."""
        return f"{self.label} connections"

    @abstractmethod
    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one site's parameters by name, in order.

        Raises:
            UserError: as `slot_width`.
        """

    @abstractmethod
    def is_identity(self, name: str, tensor: "Tensor") -> bool:
        """True if a site with such values is a plain residual connection, whatever its other parameters are.

        Args:
            name: of a parameter.
            tensor: its values; a checkpoint may have stacked those of many sites along a first axis.
        """

    @property
    def can_be_residual(self) -> bool:
        """Whether there are values at which the network is the residual one with the same weights."""
        return True

    def refuse_residual_start(self) -> None:
        """Check that the network can start as the residual one.

        Raises:
            UserError: there are no such values.
        """
        if not self.can_be_residual:
            raise UserError(
                f"{self.label} is never the residual network: start it from random weights, or upcycle to dfc, dhc or "
                f"mhc with at least 2 slots"
            )

    @classmethod
    @abstractmethod
    def recognise(cls, sizes: Mapping[str, int]) -> Self | None:
        """Return the member of this kind whose parameters have these last dimensions, None if none has them.

        Options that no parameter shows take their defaults.
        """

    @abstractmethod
    def build(self, hidden_size: int, sub_layer: int = 0) -> "Connection":
        """Return the module of one site.

        Args:
            hidden_size: width d of a sub-layer's input and output.
            sub_layer: number of the sub-layer in the network, from 0, on which initial values may depend.

        Raises:
            UserError: as `slot_width`.
        """

    def slot_width(self, hidden_size: int) -> int:
        """Return c = d / m, the width of one slot.

        Raises:
            UserError: m does not divide the hidden size.
        """
        if hidden_size < 1 or hidden_size % self.fractions:
            name = self.fractions_option
            what = "number of fractions" if name == "fractions" else name
            raise UserError(
                f"{self.label}: {name}={self.fractions} does not divide hidden_size={hidden_size}: "
                f"choose a {what} that does, for example {_divisors(hidden_size)}"
            )
        return hidden_size // self.fractions

    def stream_width(self, hidden_size: int) -> int:
        """Return n*c, the width of the residual stream between sub-layers."""
        return self.slots * self.slot_width(hidden_size)

    def build_leave(self, hidden_size: int) -> "nn.Module":
        """Return the module that closes the network: the stream [..., n*c] -> what the last norm takes, [..., d].

        Raises:
            UserError: as `slot_width`.
        """
        self.slot_width(hidden_size)
        leave: nn.Module = load("megatron_fc.connections.ends.MeanLeave")(self)
        return leave

    def leave_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes by name of the parameters that `build_leave` has, of which most kinds have none."""
        self.slot_width(hidden_size)
        return {}

    def parameter_count(self, hidden_size: int) -> int:
        """Return the parameters of one site."""
        return sum(map(prod, self.parameter_shapes(hidden_size).values()))

    def last_dimensions(self, hidden_size: int) -> dict[str, int]:
        """Return the last dimension of every parameter, those of `build_leave` included.

        It is the same where a checkpoint has stacked sites along a first one.
        """
        shapes = self.parameter_shapes(hidden_size) | self.leave_shapes(hidden_size)
        return {name: shape[-1] for name, shape in shapes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML, JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; missing fields take their defaults.

        Raises:
            UserError: an unknown name (the nearest valid one is given) or a wrong value.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise UserError(unknown(f"{cls.kind} option", name, names))
        return cls(**values)


class Connection(Protocol):
    """One site: the width connection before a sub-layer, the depth connection after it.

    ::

        H = c.enter(h)       # once, before the first site: [..., d] -> the stream [..., n*c]
        x = c(H)             # the sub-layer's input [..., d]
        H = c.depth(o, H)    # the next stream, o being the sub-layer's output [..., d]
        h = c.leave(H)       # once, behind the last site: [..., n*c] -> [..., d]

    A `torch.nn.Module` whose parameters have the names and shapes of its configuration's `parameter_shapes`.
    """

    @property
    def config(self) -> ConnectionConfig: ...

    def enter(self, h: "Tensor") -> "Tensor":
        """What the first site takes: an embedding [..., d] in every slot that stands for a part of it."""
        ...

    def __call__(self, h: "Tensor", norm: "Callable[[Tensor], Tensor] | None" = None, hand_over: bool = False) -> Any:
        """The width connection.

        Args:
            h: the stream.
            norm: of the sub-layer's input, applied to x.
            hand_over: also return what `depth` can take over instead of looking at h again.

        Returns:
            x [..., d]; with `hand_over` (x, handover), the second of the kind's own making.
        """
        ...

    def depth(
        self, o: "Tensor", h: "Tensor", handover: Any = None, bias: "Tensor | None" = None, dropout: float = 0.0
    ) -> "Tensor":
        """The depth connection.

        Args:
            o: the sub-layer's output [..., d].
            h: the stream that went into it.
            handover: what the width connection handed over for h.
            bias: [d], added to o.
            dropout: probability for an element of o to be dropped.

        Returns:
            The next stream.
        """
        ...

    def leave(self, h: "Tensor") -> "Tensor":
        """What the network's last norm takes, [..., d]; the same as calling `ConnectionConfig.build_leave`.

        Raises:
            UserError: that module has parameters, which belong to the network and not to a site.
        """
        ...

    def start_as_residual(self) -> None:
        """Set initial values at which the network is the residual one with the same weights.

        Raises:
            UserError: as `ConnectionConfig.refuse_residual_start`.
        """
        ...

    def named_parameters(self) -> "Iterator[tuple[str, Tensor]]": ...


def load(name: str) -> Any:
    """Return what stands under a dotted name: modules of sites import their configurations, never the reverse."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def check_values(config: ConnectionConfig) -> None:
    """Check every field against its type: whole numbers from 1 or `least`, booleans, finite numbers, choices.

    Raises:
        UserError: names the field, its value, and what it may be.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        optional = field.type == bool | None  # None: as another field says
        if (field.type is bool or optional) and not isinstance(value, bool) and not (optional and value is None):
            raise UserError(f"{name} must be true or false, not {value!r}")
        least = field.metadata.get("least", 1)
        if field.type is int and not (is_number and isinstance(value, int) and value >= least):
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}: use {field.default}")
        if field.type is float and not (is_number and math.isfinite(value)):
            raise UserError(f"{name} must be a finite number, not {value!r}")
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise UserError(unknown(name, str(value), get_args(field.type)))


def _divisors(hidden_size: int) -> str:
    fitting = [str(m) for m in (1, 2, 4, 8) if hidden_size > 0 and hidden_size % m == 0]
    return ", ".join(fitting) or "none, the hidden size must be positive"
