"""The norm in front of a sub-layer, as weights that a kernel can apply in the width connection's pass."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

NormKind = Literal["rmsnorm", "layernorm"]


class NormWeights(NamedTuple):
    """A norm over the whole width d.

    Attributes:
        kind: rmsnorm or layernorm.
        weight: [d].
        bias: [d] or None.
        eps: added to the mean square or the variance.
        one_plus: the weight is stored less one (Megatron's `layernorm_zero_centered_gamma`).
    """

    kind: NormKind
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5
    one_plus: bool = False


class HandsOutWeights:
    """Mixed into the class of a norm module: called without an argument, it returns its weights, applying nothing.

    Overlapped parameter gathers wait in hooks of the module that owns a parameter: so it is read by calling that one.
    """

    def forward(self, x: Any = None) -> Any:
        return _read(self) if x is None else super().forward(x)  # type: ignore[misc]


def norm_weights(norm: Any) -> NormWeights | None:
    """Return the weights of a norm, None where the kernels cannot apply it."""
    hands_out = isinstance(norm, HandsOutWeights)
    return norm() if hands_out else None


def _read(norm: Any) -> NormWeights:
    kind: NormKind = "rmsnorm" if "RMSNorm" in type(norm).__name__ else "layernorm"
    one_plus = bool(getattr(norm, "zero_centered_gamma", False))
    return NormWeights(kind, norm.weight, getattr(norm, "bias", None), norm.eps, one_plus)
