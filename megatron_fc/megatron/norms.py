"""Norms whose weights a kernel can apply: read through the module's own call, hooks included."""

from typing import Any

from torch import nn

from megatron_fc.connections.norm import NormKind, NormWeights


class _HandsOutWeights:
    """Called without an argument, the norm returns its weights instead of applying them.

    Overlapped parameter gathers wait in hooks of the module that owns a parameter: so it is read by calling that one.
    """

    def forward(self, x: Any = None) -> Any:
        return _read(self) if x is None else super().forward(x)  # type: ignore[misc]


def hand_out_weights(norm: nn.Module) -> nn.Module:
    """Make a norm hand out its weights, if it is one that the kernels know; it stays an instance of its class."""
    if _kind(norm) is not None:
        norm.__class__ = type(type(norm).__name__, (_HandsOutWeights, type(norm)), {})
    return norm


def norm_weights(norm: nn.Module) -> NormWeights | None:
    """Return the weights of a norm, None where the kernels cannot apply it."""
    return norm() if isinstance(norm, _HandsOutWeights) else None


def _kind(norm: nn.Module) -> NormKind | None:
    """torch's norms, and Transformer Engine's and Apex's, which name their parameters alike."""
    known = type(norm).__module__.split(".")[0] in ("torch", "transformer_engine", "apex")
    kinds: dict[str, NormKind] = {
        "RMSNorm": "rmsnorm",
        "LayerNorm": "layernorm",
        "FusedRMSNorm": "rmsnorm",
        "FusedLayerNorm": "layernorm",
    }
    return kinds.get(type(norm).__name__) if known and getattr(norm, "weight", None) is not None else None


def _read(norm: Any) -> NormWeights:
    kind: NormKind = "rmsnorm" if "RMSNorm" in type(norm).__name__ else "layernorm"
    one_plus = bool(getattr(norm, "zero_centered_gamma", False))
    return NormWeights(kind, norm.weight, getattr(norm, "bias", None), norm.eps, one_plus)
