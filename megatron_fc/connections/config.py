"""FracConfig and HyperConfig: every option of a kind of connection, validated once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from megatron_fc.connections import per_slot
from megatron_fc.connections.base import Connection, ConnectionConfig, check_values, load

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["rmsnorm", "layernorm", "none"]
Backend = Literal["auto", "triton", "torch"]
InputNorm = Literal["width", "projection"]


@dataclass(frozen=True)
class FracConfig(ConnectionConfig):
    """Options of a Frac-Connection (arXiv 2503.14125, section 3).

    Args:
        rate: frac-rate m, the number of fractions that the residual stream is split into; it divides the
            hidden size.
        dynamic: True predicts the weights per token (DFC, eq. 9-14); False keeps the static part alone (SFC).
        norm: normalisation of each fraction before the prediction. Both norms have a weight and no bias.
        tanh: bound the predicted part by tanh (eq. 12-14).
        scale: multiply the predicted part by the learned scalars s_alpha and s_beta (eq. 12-14).
        initial_scale: initial value of both scalars.
        norm_eps: epsilon of the norm, FC's own and independent of the model's.
        recompute: keep the residual stream and the sub-layer's output for backward and compute the rest again; changes
            memory and time, no result, and two configs that differ in it alone are equal.
        backend: triton (fused kernels, rates 1, 2, 4, 8), torch, or auto: triton where it can run. No part of equality.
        input_norm: what applies a sub-layer's norm where Transformer Engine can do so inside its projection: the width
            connection, in the same pass, or that projection. No part of equality: checkpoints are the same.

    Raises:
        UserError: a value is out of range, or an option of the dynamic part is changed in a static connection.
    """

    kind: ClassVar[str] = "frac"
    parameter_names: ClassVar[tuple[str, ...]] = per_slot.PARAMETER_NAMES
    fractions_option: ClassVar[str] = "rate"

    rate: int = 4
    dynamic: bool = True
    norm: Norm = "rmsnorm"
    tanh: bool = True
    scale: bool = True
    initial_scale: float = 0.01
    norm_eps: float = 1e-5
    # No part of what the connection computes: a checkpoint may be continued with the other setting.
    recompute: bool = field(default=False, compare=False)
    backend: Backend = field(default="auto", compare=False)
    input_norm: InputNorm = field(default="width", compare=False)

    def __post_init__(self) -> None:
        check_values(self)
        per_slot.check_options(self)

    @property
    def slots(self) -> int:
        """n = m: one slot per fraction."""
        return self.rate

    @property
    def fractions(self) -> int:
        return self.rate

    @property
    def label(self) -> str:
        """``dfc_x4`` or ``sfc_x4``."""
        return f"{'dfc' if self.dynamic else 'sfc'}_x{self.rate}"

    @property
    def description(self) -> str:
        return per_slot.description(self, self.label)

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Those of eq. 16-20: the statics, and for DFC W, the scales and the norm's weight."""
        return per_slot.parameter_shapes(self, self.slot_width(hidden_size))

    def is_identity(self, name: str, tensor: "Tensor") -> bool:
        """B = 1, Y = A = I, W = 0."""
        return per_slot.is_identity(self, name, tensor)

    @classmethod
    def recognise(cls, sizes: Mapping[str, int]) -> Self | None:
        return per_slot.recognise(cls, "rate", sizes)

    def build(self, hidden_size: int, sub_layer: int = 0) -> Connection:
        """Return a `FracConnection`; its initial values are the same in every sub-layer."""
        site: Connection = load("megatron_fc.connections.frac.FracConnection")(hidden_size, self)
        return site


@dataclass(frozen=True)
class HyperConfig(ConnectionConfig):
    """Options of a Hyper-Connection (arXiv 2409.19606): n streams of the whole width.

    Args:
        slots: expansion rate n, the number of streams.
        dynamic: True predicts the weights per token (DHC, eq. 10-13); False keeps the static part alone (SHC).
        norm: normalisation of each stream before the prediction. Both norms have a weight and no bias.
        tanh: bound the predicted part by tanh.
        scale: multiply the predicted part by the learned scalars s_alpha and s_beta.
        initial_scale: initial value of both scalars.
        norm_eps: epsilon of the norm, the connection's own and independent of the model's.

    Raises:
        UserError: a value is out of range, or an option of the dynamic part is changed in a static connection.
    """

    kind: ClassVar[str] = "hyper"
    parameter_names: ClassVar[tuple[str, ...]] = per_slot.PARAMETER_NAMES

    slots: int = 4
    dynamic: bool = True
    norm: Norm = "rmsnorm"
    tanh: bool = True
    scale: bool = True
    initial_scale: float = 0.01
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_values(self)
        per_slot.check_options(self)

    @property
    def fractions(self) -> int:
        """m = 1: a slot is as wide as a sub-layer's input."""
        return 1

    @property
    def label(self) -> str:
        """``dhc_x4`` or ``shc_x4``."""
        return f"{'dhc' if self.dynamic else 'shc'}_x{self.slots}"

    @property
    def description(self) -> str:
        return per_slot.description(self, self.label)

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return per_slot.parameter_shapes(self, self.slot_width(hidden_size))

    def is_identity(self, name: str, tensor: "Tensor") -> bool:
        """B = 1, A_m one stream, A_r = I, W = 0."""
        return per_slot.is_identity(self, name, tensor)

    @classmethod
    def recognise(cls, sizes: Mapping[str, int]) -> Self | None:
        return per_slot.recognise(cls, "slots", sizes)

    def build(self, hidden_size: int, sub_layer: int = 0) -> Connection:
        """Return a `HyperConnection`, whose input starts as stream `sub_layer % n`."""
        site: Connection = load("megatron_fc.connections.hyper.HyperConnection")(hidden_size, self, sub_layer)
        return site
