"""FracConfig, HyperConfig and ManifoldConfig: every option of a kind of connection, validated once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from megatron_fc.connections import on_manifold, per_slot
from megatron_fc.connections.base import Connection, ConnectionConfig, check_values, load
from megatron_fc.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Norm = Literal["rmsnorm", "layernorm", "none"]
Backend = Literal["auto", "triton", "torch"]
InputNorm = Literal["width", "projection"]
Leave = Literal["mean", "learned"]


@dataclass(frozen=True)
class FracConfig(ConnectionConfig):
    """Options of a Frac-Connection (arXiv 2503.14125, section 3).

    Args:
        rate: frac-rate m, the number of fractions that the residual stream is split into; it divides the
            hidden size.
        dynamic: True predicts the weights per token (DFC, eq. 9-14); False keeps the static part alone (SFC).
        dynamic_beta: None goes with `dynamic`; False keeps beta static in a dynamic connection (Algorithm 2).
        dynamic_alpha: the same of gamma and alpha.
        norm: normalisation of each fraction before the prediction. Both norms have a weight and no bias.
        norm_affine: False leaves the weight out.
        tanh: bound the predicted part by tanh (eq. 12-14).
        scale: multiply the predicted part by the learned scalars s_alpha and s_beta (eq. 12-14).
        initial_scale: initial value of both scalars.
        norm_eps: epsilon of the norm, FC's own and independent of the model's.
        recompute: keep the residual stream and the sub-layer's output for backward and compute the rest again; changes
            memory and time, no result, and two configs that differ in it alone are equal.
        backend: triton (fused kernels, rates 1, 2, 4, 8 and 16), torch, or auto: triton where it can run. No part of
            equality.
        input_norm: what applies a sub-layer's norm where Transformer Engine can do so inside its projection: the width
            connection, in the same pass, or that projection. No part of equality: checkpoints are the same.

    Raises:
        UserError: a value is out of range, or an option of the dynamic part is changed in a static connection.
    """

    kind: ClassVar[str] = "frac"
    parameter_names: ClassVar[tuple[str, ...]] = per_slot.PARAMETER_NAMES
    slots_option: ClassVar[str] = "rate"
    fractions_option: ClassVar[str] = "rate"

    rate: int = 4
    dynamic: bool = True
    dynamic_beta: bool | None = None
    dynamic_alpha: bool | None = None
    norm: Norm = "rmsnorm"
    norm_affine: bool = True
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
    def applies_norm(self) -> bool:
        return self.input_norm == "width"

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
        n, m = per_slot.slots_and_fractions(sizes)
        return per_slot.recognise(cls, {"rate": n}, sizes) if n == m > 0 else None

    def build(self, hidden_size: int, sub_layer: int = 0) -> Connection:
        """Return a `FracConnection`; its initial values are the same in every sub-layer."""
        site: Connection = load("megatron_fc.connections.frac.FracConnection")(hidden_size, self)
        return site


@dataclass(frozen=True)
class HyperConfig(ConnectionConfig):
    """Options of a Hyper-Connection (arXiv 2409.19606): n streams of the whole width.

    With fractions > 1 the shape between Hyper- and Frac-Connections: n slots of width d/m, a sub-layer's output being
    written to them in turn. That is the shape of Generalized Hyper-Connections (arXiv 2511.11238), which differ: a full
    m x n write matrix, scale matrices, a divisor inside the tanh, over-width embeddings and a linear map at the end.

    Args:
        slots: expansion rate n, the number of streams, a multiple of `fractions`.
        fractions: m, parts that a sub-layer's input and output are split into.
        dynamic: True predicts the weights per token (DHC, eq. 10-13); False keeps the static part alone (SHC).
        dynamic_beta: None goes with `dynamic`; False keeps beta static in a dynamic connection.
        dynamic_alpha: the same of gamma and alpha.
        norm: normalisation of each slot before the prediction. Both norms have a weight and no bias.
        norm_affine: False leaves the weight out, which the paper's counts do.
        tanh: bound the predicted part by tanh.
        scale: multiply the predicted part by the learned scalars s_alpha and s_beta.
        initial_scale: initial value of both scalars.
        norm_eps: epsilon of the norm, the connection's own and independent of the model's.
        scale_output_init: a fresh model's output projections start sqrt(n/m) times larger (2409.19606, section 3);
            False: it starts as the plain model. No part of equality: weights that are loaded stay as they are.
        stream_layers: layers that keep one stream together for backward and compute the others again, as well as the
            inputs of their norms; 0: every sub-layer keeps its own. No part of equality: it changes no result.
        backend: as of `FracConfig`; the kernels are for 1, 2, 4, 8 and 16 slots.

    Raises:
        UserError: a value is out of range, an option of the dynamic part is changed in a static connection, or the
            shape is a Frac-Connection's.
    """

    kind: ClassVar[str] = "hyper"
    parameter_names: ClassVar[tuple[str, ...]] = per_slot.PARAMETER_NAMES

    slots: int = 4
    fractions: int = 1
    dynamic: bool = True
    dynamic_beta: bool | None = None
    dynamic_alpha: bool | None = None
    norm: Norm = "rmsnorm"
    norm_affine: bool = True
    tanh: bool = True
    scale: bool = True
    initial_scale: float = 0.01
    norm_eps: float = 1e-5
    # No part of what the connection computes.
    scale_output_init: bool = field(default=True, compare=False)
    stream_layers: int = field(default=0, compare=False, metadata={"least": 0})
    backend: Backend = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        check_values(self)
        per_slot.check_options(self)
        if self.slots % self.fractions:
            over = self.slots + -self.slots % self.fractions
            raise UserError(f"slots={self.slots} is no multiple of fractions={self.fractions}: use slots={over}")
        if self.slots == self.fractions > 1:
            raise UserError(
                f"as many fractions as slots are a Frac-Connection: use dfc or sfc, FracConfig(rate={self.slots})"
            )

    @property
    def label(self) -> str:
        """``dhc_x4``, ``shc_x4``, or with two fractions ``dhc_x4_m2``."""
        between = f"_m{self.fractions}" if self.fractions > 1 else ""
        return f"{'dhc' if self.dynamic else 'shc'}_x{self.slots}{between}"

    @property
    def description(self) -> str:
        return per_slot.description(self, self.label)

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return per_slot.parameter_shapes(self, self.slot_width(hidden_size))

    def is_identity(self, name: str, tensor: "Tensor") -> bool:
        """beta = 1, every fraction read from one slot that stands for it, alpha = I, W = 0."""
        return per_slot.is_identity(self, name, tensor)

    @classmethod
    def recognise(cls, sizes: Mapping[str, int]) -> Self | None:
        n, m = per_slot.slots_and_fractions(sizes)
        return per_slot.recognise(cls, {"slots": n, "fractions": m}, sizes) if n else None

    def build(self, hidden_size: int, sub_layer: int = 0) -> Connection:
        """Return a `HyperConnection`, whose input starts as stream `sub_layer % n`."""
        site: Connection = load("megatron_fc.connections.hyper.HyperConnection")(hidden_size, self, sub_layer)
        return site


@dataclass(frozen=True)
class ManifoldConfig(ConnectionConfig):
    """Options of a manifold-constrained Hyper-Connection (mHC, arXiv 2512.24880 section 4.2).

    gamma and beta are sigmoids, alpha is doubly stochastic, and all are predicted from the whole stream. With as many
    fractions as slots the same holds for a Frac-Connection: mFC, which is ours and has no paper.

    Args:
        slots: expansion rate n, the number of streams.
        fractions: 1 for mHC; n for mFC, whose slots are fractions of one stream.
        sinkhorn_iterations: normalisations of alpha's columns, with one of its rows before each but the first.
        sinkhorn_eps: added to alpha before the first of them, to every sum that they divide by, and to gamma.
        norm_eps: added to the mean square of the stream.
        leave: how the network closes: the mean of the streams, or a learned, sigmoid-weighted sum, as DeepSeek-V4 does.
        stream_layers: as of `HyperConfig`.
        backend: as of `HyperConfig`; the projection of the stream is torch's in any case.

    Raises:
        UserError: a value is out of range, or between mHC and mFC.
    """

    kind: ClassVar[str] = "manifold"
    parameter_names: ClassVar[tuple[str, ...]] = on_manifold.PARAMETER_NAMES

    slots: int = 4
    fractions: int = 1
    sinkhorn_iterations: int = 20
    sinkhorn_eps: float = 1e-6
    norm_eps: float = 1e-6
    leave: Leave = "mean"
    # No part of what the connection computes.
    stream_layers: int = field(default=0, compare=False, metadata={"least": 0})
    backend: Backend = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        check_values(self)
        on_manifold.check_options(self)

    @property
    def label(self) -> str:
        """``mhc_x4`` or ``mfc_x4``."""
        return f"{'mhc' if self.fractions == 1 else 'mfc'}_x{self.slots}"

    @property
    def description(self) -> str:
        return f"{self.label} connections" + (" with leave=learned" if self.leave == "learned" else "")

    def parameter_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return on_manifold.parameter_shapes(self, self.stream_width(hidden_size))

    def leave_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return on_manifold.leave_shapes(self, self.stream_width(hidden_size)) if self.leave == "learned" else {}

    def build_leave(self, hidden_size: int) -> "nn.Module":
        if self.leave == "mean":
            return super().build_leave(hidden_size)
        leave: nn.Module = load("megatron_fc.connections.ends.LearnedLeave")(hidden_size, self)
        return leave

    @property
    def can_be_residual(self) -> bool:
        """mHC can: the slots of mFC hold different content, and of one stream gamma, a sigmoid, is never 1."""
        return self.fractions == 1 < self.slots

    def is_identity(self, name: str, tensor: "Tensor") -> bool:
        """Of mHC, up to the epsilons: scales 0, beta 1 and gamma 1/n. Of mFC never."""
        return self.can_be_residual and on_manifold.is_identity(self, name, tensor)

    @classmethod
    def recognise(cls, sizes: Mapping[str, int]) -> Self | None:
        return on_manifold.recognise(cls, sizes)

    def build(self, hidden_size: int, sub_layer: int = 0) -> Connection:
        """Return a `ManifoldConnection`; its initial values are of the same kind in every sub-layer."""
        site: Connection = load("megatron_fc.connections.manifold.ManifoldConnection")(hidden_size, self)
        return site
