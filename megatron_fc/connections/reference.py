"""The family of connections in plain PyTorch: the readable reference that every other implementation is held against.

One operator: a stream of n slots h_1..h_n of width c = d/m, whose sub-layers take and return m fractions::

    x_i  = sum_j gamma_ji h_j                                     i = 1..m   width connection: read
    h'_j = beta_j o_((j-1) mod m + 1) + sum_k alpha_kj h_k        j = 1..n   depth connection: write and carry

n = m are Frac-Connections (arXiv 2503.14125 eq. 6-8), m = 1 Hyper-Connections (2409.19606). Row index of gamma and
alpha: source slot, column: destination. Two ways to predict the coefficients: slot by slot, or on a manifold
(2512.24880). Coefficients and mixing are computed in fp32 (fp64 for an fp64 stream), results are returned in the
stream's dtype (2503.14125, Algorithm 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig, Norm
from megatron_fc.connections.ends import enter
from megatron_fc.connections.on_manifold import ManifoldParameters, blocks
from megatron_fc.connections.per_slot import PerSlotParameters, predicts_alpha, predicts_beta

PerSlotConfig = FracConfig | HyperConfig
Config = PerSlotConfig | ManifoldConfig
Parameters = PerSlotParameters | ManifoldParameters


def slots(h: Tensor, count: int) -> Tensor:
    """Split [..., count*c] into [..., count, c] (eq. 6), upcast to at least fp32."""
    return h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(-1, (count, -1))


def width(h: Tensor, p: Parameters, config: Config) -> Tensor:
    """Width connection: the sub-layer's input, x_i = sum_j gamma_ji h_j (eq. 8).

    Args:
        h: stream [..., n*c].

    Returns:
        [..., d] in the dtype of h, before the sub-layer's own norm.
    """
    with torch.autocast(h.device.type, enabled=False):
        s = slots(h, config.slots)
        return _mix(gamma(s, p, config), s).flatten(-2).to(h.dtype)


def depth(o: Tensor, h: Tensor, p: Parameters, config: Config) -> Tensor:
    """Depth connection: the next stream, h'_j = beta_j o_((j-1) mod m + 1) + sum_k alpha_kj h_k (eq. 8).

    Args:
        o: sub-layer output [..., d].
        h: the stream [..., n*c] that went into `width`.

    Returns:
        [..., n*c] in the dtype of h.
    """
    with torch.autocast(h.device.type, enabled=False):
        s = slots(h, config.slots)
        update = beta(s, p, config).unsqueeze(-1) * slots(enter(o, config), config.slots)
        return (update + _mix(alpha(s, p, config), s)).flatten(-2).to(h.dtype)


def gamma(s: Tensor, p: Parameters, config: Config) -> Tensor:
    """Weights of the width connection for slots [..., n, c]: [..., n, m], or [n, m] if static."""
    n, m = config.slots, config.fractions
    if isinstance(p, ManifoldParameters):
        assert isinstance(config, ManifoldConfig)
        return (torch.sigmoid(_map(s, p, config)[0]) + config.sinkhorn_eps).unflatten(-1, (n, m))
    assert not isinstance(config, ManifoldConfig)
    static = p.static_gamma.unflatten(0, (n, m))
    if not predicts_alpha(config):
        return static
    first = int(predicts_beta(config))
    return static + _predict(s, p, config, slice(first, first + m), p.scale_alpha)


def alpha(s: Tensor, p: Parameters, config: Config) -> Tensor:
    """Weights among slots in the depth connection: [..., n, n], or [n, n] if static."""
    n = config.slots
    if isinstance(p, ManifoldParameters):
        assert isinstance(config, ManifoldConfig)
        return sinkhorn(_map(s, p, config)[2].unflatten(-1, (n, n)), config.sinkhorn_iterations, config.sinkhorn_eps)
    assert not isinstance(config, ManifoldConfig)
    static = p.static_alpha.unflatten(0, (n, n))
    return static + _predict(s, p, config, slice(-n, None), p.scale_alpha) if predicts_alpha(config) else static


def beta(s: Tensor, p: Parameters, config: Config) -> Tensor:
    """Weights of the sub-layer's output in the depth connection: [..., n], or [n] if static."""
    if isinstance(p, ManifoldParameters):
        assert isinstance(config, ManifoldConfig)
        return 2 * torch.sigmoid(_map(s, p, config)[1])
    assert not isinstance(config, ManifoldConfig)
    static = p.static_beta
    if not predicts_beta(config):
        return static
    return static + _predict(s, p, config, slice(0, 1), p.scale_beta).squeeze(-1)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Matrices [..., n, n] with rows and columns that sum to 1, up to eps, the columns last."""
    table = torch.softmax(logits, -1) + eps
    table = table / (table.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        table = table / (table.sum(-1, keepdim=True) + eps)
        table = table / (table.sum(-2, keepdim=True) + eps)
    return table


def _mix(weights: Tensor, s: Tensor) -> Tensor:
    return torch.einsum("...ij,...ic->...jc", weights, s)


def _predict(s: Tensor, p: PerSlotParameters, config: PerSlotConfig, rows: slice, scale: Tensor | None) -> Tensor:
    """Dynamic part of the coefficients in `rows` of W: s * tanh(norm(h) W), [..., n, rows] (eq. 9-14)."""
    assert p.dynamic_weight is not None
    z = F.linear(_normalise(s, config.norm, p.norm_weight, config.norm_eps), p.dynamic_weight[rows])
    z = torch.tanh(z) if config.tanh else z
    return z if scale is None else scale * z


def _normalise(s: Tensor, norm: Norm, weight: Tensor | None, eps: float) -> Tensor:
    if norm == "none":
        return s
    shape = s.shape[-1:]
    return F.rms_norm(s, shape, weight, eps) if norm == "rmsnorm" else F.layer_norm(s, shape, weight, None, eps)


def _map(s: Tensor, p: ManifoldParameters, config: ManifoldConfig) -> tuple[Tensor, ...]:
    """Logits of gamma [..., n*m], beta [..., n] and alpha [..., n*n], all from the whole stream."""
    stream = s.flatten(-2)
    u = F.rms_norm(stream, stream.shape[-1:], None, config.norm_eps)
    sizes = blocks(config.slots, config.fractions)
    z, bias = (t.split(sizes, -1) for t in (F.linear(u, p.mapping_weight), p.mapping_bias))
    return tuple(scale * part + b for scale, part, b in zip(p.mapping_scale, z, bias, strict=True))
