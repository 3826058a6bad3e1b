"""Frac-Connections in plain PyTorch: the readable reference that every other implementation is held against.

The notation is the paper's (arXiv 2503.14125): h is the residual stream of width d, split into m contiguous
fractions h_1..h_m of width c = d/m. Row i of gamma and alpha belongs to the source fraction, column j to the
destination. Coefficients and mixing are computed in fp32 (fp64 for an fp64 stream), results are returned in the
stream's dtype (Algorithm 2).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc.connections.config import FracConfig, Norm


class FracParameters(NamedTuple):
    """The parameters of one site. The dynamic ones are None where the configuration has none.

    Shapes: static_beta (m,), static_gamma and static_alpha (m*m,) row-major, dynamic_weight (2m+1, c) with rows
    beta, gamma_1..m, alpha_1..m, scale_beta and scale_alpha (1,), norm_weight (c,).
    """

    static_beta: Tensor
    static_gamma: Tensor
    static_alpha: Tensor
    dynamic_weight: Tensor | None = None
    scale_beta: Tensor | None = None
    scale_alpha: Tensor | None = None
    norm_weight: Tensor | None = None


def fractions(h: Tensor, rate: int) -> Tensor:
    """Split a stream [..., d] into fractions [..., m, c] (eq. 6), upcast to at least fp32."""
    return h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(-1, (rate, -1))


def gamma(f: Tensor, p: FracParameters, config: FracConfig) -> Tensor:
    """Weights of the width connection, Y(H) of eq. 13: [..., m, m] for DFC, [m, m] for SFC."""
    m = config.rate
    static = p.static_gamma.unflatten(0, (m, m))
    return static if p.dynamic_weight is None else static + _predict(f, p, config, slice(1, 1 + m), p.scale_alpha)


def alpha(f: Tensor, p: FracParameters, config: FracConfig) -> Tensor:
    """Weights among the fractions in the depth connection, A(H) of eq. 14: [..., m, m] or [m, m]."""
    m = config.rate
    static = p.static_alpha.unflatten(0, (m, m))
    return static if p.dynamic_weight is None else static + _predict(f, p, config, slice(1 + m, None), p.scale_alpha)


def beta(f: Tensor, p: FracParameters, config: FracConfig) -> Tensor:
    """Weights of the sub-layer's output in the depth connection, B(H) of eq. 12: [..., m] or [m]."""
    static = p.static_beta
    return (
        static if p.dynamic_weight is None else static + _predict(f, p, config, slice(0, 1), p.scale_beta).squeeze(-1)
    )


def width(h: Tensor, p: FracParameters, config: FracConfig) -> Tensor:
    """Width connection: the sub-layer's input, x_j = sum_i gamma_ij h_i (eq. 8).

    Args:
        h: residual stream [..., d].

    Returns:
        [..., d] in the dtype of h, before the sub-layer's own norm.
    """
    with torch.autocast(h.device.type, enabled=False):
        f = fractions(h, config.rate)
        return _mix(gamma(f, p, config), f).flatten(-2).to(h.dtype)


def depth(o: Tensor, h: Tensor, p: FracParameters, config: FracConfig) -> Tensor:
    """Depth connection: the next residual stream, h'_j = beta_j o_j + sum_i alpha_ij h_i (eq. 8).

    Args:
        o: sub-layer output [..., d].
        h: the residual stream [..., d] that went into `width`.

    Returns:
        [..., d] in the dtype of h.
    """
    with torch.autocast(h.device.type, enabled=False):
        f = fractions(h, config.rate)
        update = beta(f, p, config).unsqueeze(-1) * fractions(o, config.rate)
        return (update + _mix(alpha(f, p, config), f)).flatten(-2).to(h.dtype)


def _mix(weights: Tensor, f: Tensor) -> Tensor:
    return torch.einsum("...ij,...ic->...jc", weights, f)


def _predict(f: Tensor, p: FracParameters, config: FracConfig, rows: slice, scale: Tensor | None) -> Tensor:
    """Dynamic part of the coefficients in `rows` of W: s * tanh(norm(f) W), [..., m, rows] (eq. 9-14)."""
    assert p.dynamic_weight is not None
    z = F.linear(_normalise(f, config.norm, p.norm_weight, config.norm_eps), p.dynamic_weight[rows])
    z = torch.tanh(z) if config.tanh else z
    return z if scale is None else scale * z


def _normalise(f: Tensor, norm: Norm, weight: Tensor | None, eps: float) -> Tensor:
    if norm == "none":
        return f
    shape = f.shape[-1:]
    return F.rms_norm(f, shape, weight, eps) if norm == "rmsnorm" else F.layer_norm(f, shape, weight, None, eps)
