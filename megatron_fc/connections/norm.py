"""The norm in front of a sub-layer, as weights that a kernel can apply in the width connection's pass."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.observers import observed

LEAST_EPS = 1e-30  # that fp32 adds to a square
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

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles and copies: the class is made at run time (`handing_out`), so they make it anew."""
        return _blank, (type(self).__bases__[1],), self.__dict__


def handing_out(norm: Any) -> Any:
    """The class of a norm with `HandsOutWeights`, under the same name."""
    return type(norm.__name__, (HandsOutWeights, norm), {})


def _blank(norm: type) -> Any:
    kind = handing_out(norm)
    return kind.__new__(kind)


def norm_weights(norm: Any, stream: Tensor) -> NormWeights | None:
    """Return the weights of a norm, None where the kernels cannot apply it as it would itself.

    They return the stream's dtype. A norm in another dtype, or any under autocast, decides for itself what it returns;
    and a norm that is observed, or has no epsilon, is called.
    """
    hands_out = isinstance(norm, HandsOutWeights)
    if not hands_out or observed(norm):
        return None
    if not stream.is_meta and torch.is_autocast_enabled(stream.device.type):
        return None
    weights: NormWeights = norm()
    # Rows of zeros behind the last token would be NaN without an epsilon; torch's default is the dtype's own.
    has_eps = weights.eps is not None and weights.eps >= LEAST_EPS
    return weights if has_eps and weights.weight.dtype == stream.dtype else None


def _read(norm: Any) -> NormWeights:
    kind: NormKind = "rmsnorm" if "RMSNorm" in type(norm).__name__ else "layernorm"
    one_plus = bool(getattr(norm, "zero_centered_gamma", False))
    return NormWeights(kind, norm.weight, getattr(norm, "bias", None), norm.eps, one_plus)
