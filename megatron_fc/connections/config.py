"""FracConfig: every knob of a Frac-Connection, validated once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from megatron_fc.errors import UserError, unknown

Norm = Literal["rmsnorm", "layernorm", "none"]
Backend = Literal["auto", "triton", "torch"]
InputNorm = Literal["width", "projection"]


@dataclasses.dataclass(frozen=True)
class FracConfig:
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

    rate: int = 4
    dynamic: bool = True
    norm: Norm = "rmsnorm"
    tanh: bool = True
    scale: bool = True
    initial_scale: float = 0.01
    norm_eps: float = 1e-5
    # No part of what the connection computes: a checkpoint may be continued with the other setting.
    recompute: bool = dataclasses.field(default=False, compare=False)
    backend: Backend = dataclasses.field(default="auto", compare=False)
    input_norm: InputNorm = dataclasses.field(default="width", compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, int) or self.rate < 1:
            raise UserError(f"rate must be a whole number of at least 1, not {self.rate!r}: use 2, 4 or 8")
        for name in ("dynamic", "tanh", "scale", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.norm not in get_args(Norm):
            raise UserError(unknown("norm", str(self.norm), get_args(Norm)))
        if self.backend not in get_args(Backend):
            raise UserError(unknown("backend", str(self.backend), get_args(Backend)))
        if self.input_norm not in get_args(InputNorm):
            raise UserError(unknown("input_norm", str(self.input_norm), get_args(InputNorm)))
        for name in ("initial_scale", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value!r}")
        if self.norm_eps <= 0:
            raise UserError(f"norm_eps must be greater than 0, not {self.norm_eps!r}: use 1e-5")
        if not self.dynamic:
            self._refuse_dynamic_options()
        if not self.scale and self.initial_scale != 0.01:
            raise UserError(f"initial_scale={self.initial_scale!r} has no effect with scale=false: drop one of the two")

    def _refuse_dynamic_options(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rate", "dynamic") and field.compare and value != field.default:
                raise UserError(
                    f"{field.name}={value!r} has no effect on static connections (dynamic=false): "
                    f"drop it or set dynamic=true"
                )

    @property
    def label(self) -> str:
        """Short name as in the paper's tables, e.g. ``dfc_x4``."""
        return f"{'dfc' if self.dynamic else 'sfc'}_x{self.rate}"

    def fraction_size(self, hidden_size: int) -> int:
        """Return c = d / m, the width of one fraction.

        Raises:
            UserError: m does not divide the hidden size.
        """
        if hidden_size < 1 or hidden_size % self.rate:
            raise UserError(
                f"rate={self.rate} does not divide hidden_size={hidden_size}: "
                f"choose a rate that does, for example {_divisors(hidden_size)}"
            )
        return hidden_size // self.rate

    def parameter_count(self, hidden_size: int) -> int:
        """Return the parameters of one site (eq. 16-20): the statics, and for DFC W, s and the norm's weight."""
        m, c = self.rate, self.fraction_size(hidden_size)
        count = m * (2 * m + 1)
        if self.dynamic:
            count += c * (2 * m + 1) + (2 if self.scale else 0) + (c if self.norm != "none" else 0)
        return count

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML, JSON and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FracConfig":
        """Build from plain values; missing fields take their defaults.

        Raises:
            UserError: an unknown name (the nearest valid one is given) or a wrong value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise UserError(unknown("frac option", name, names))
        return cls(**values)


def _divisors(hidden_size: int) -> str:
    fitting = [str(rate) for rate in (1, 2, 4, 8) if hidden_size > 0 and hidden_size % rate == 0]
    return ", ".join(fitting) or "none, the hidden size must be positive"
