"""Coefficients predicted slot by slot, forward and backward by hand.

One product predicts all k = 1+m+n coefficients of every slot.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters


class Prediction(NamedTuple):
    """The dynamic part of the coefficients before its scale, t = tanh(z) with z = r <v, slot>; for backward, how.

    With k first, the product is fastest and what follows broadcasts along rows of T*n elements.
    """

    t: Tensor  # [k, T, n]; where a part is static, only its rows
    z: Tensor  # [k, T, n]
    slots: Tensor  # [T, n, c], centred under layernorm
    r: Tensor | None  # [T, n], 1 / their root mean square
    v: Tensor  # [k, c], dynamic_weight times norm_weight: no normalised copy of h is needed


def coefficients(s: Tensor, p: Operands) -> tuple[Tensor, Prediction | None]:
    """All coefficients of slots [T, n, c], laid out as [k, T, source], rows beta, gamma_1..m, alpha_1..n."""
    predicted = _predict(s, p)
    by_target = [table.view(p.slots, -1).t() for table in (p.static_gamma, p.static_alpha)]
    static = torch.cat((p.static_beta.unsqueeze(0), *by_target)).unsqueeze(1)
    if predicted is None:
        return static.expand(-1, s.shape[0], -1), None
    scales = _scales(p)
    if predicted.t.shape[0] < static.shape[0]:
        table = static.repeat(1, s.shape[0], 1)
        _dynamic(table, p).addcmul_(predicted.t, static.new_ones(1) if scales is None else scales)
        return table, predicted
    return static + predicted.t if scales is None else torch.addcmul(static, predicted.t, scales), predicted


def coefficients_backward(
    g_beta: Tensor, products: Tensor, g_h: Tensor, predicted: Prediction | None, p: Operands
) -> PerSlotParameters:
    """Gradients of the parameters; adds what the slots get through the coefficients to g_h [T*n, c].

    Args:
        g_beta: [T, n].
        products: gradients of gamma and alpha side by side, [T, n, m+n].
        g_h: gradient of the slots.
        predicted: of `coefficients`.
        p: the site.
    """
    gamma, alpha = (half.sum(0).flatten() for half in products.split((p.fractions, p.slots), 2))
    statics = (g_beta.sum(0), gamma, alpha)
    if predicted is None:
        return PerSlotParameters(*statics)
    g_coefficients = _dynamic(torch.cat((g_beta.unsqueeze(0), products.permute(2, 0, 1))), p)
    weight, g_scales, norm_weight = _predict_backward(g_coefficients, g_h, predicted, p)
    of_beta = of_alpha = None
    if g_scales is not None:
        first = 0 if p.scale_beta is None else 1
        of_beta = g_scales[:1] if first else None
        of_alpha = None if p.scale_alpha is None else g_scales[first:].sum(0, keepdim=True)
    return PerSlotParameters(*statics, weight, of_beta, of_alpha, norm_weight)


def _predict(s: Tensor, p: Operands) -> Prediction | None:
    v, r = p.dynamic_weight, None
    if v is None:
        return None
    if p.norm != "none":
        v = v if p.norm_weight is None else v * p.norm_weight
        if p.norm == "layernorm":  # which is rmsnorm of what is centred; so is v, for backward
            s, v = s - s.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        r = torch.linalg.vector_norm(s, dim=-1).square_().div_(v.shape[1]).add_(p.norm_eps).rsqrt_()
    z = (v @ s.flatten(0, 1).t()).view(v.shape[0], *s.shape[:2])
    if r is not None:
        z *= r
    return Prediction(_tanh(z) if p.tanh else z, z, s, r, v)


def _predict_backward(
    g_coefficients: Tensor, g_h: Tensor, predicted: Prediction, p: Operands
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of dynamic_weight, of every coefficient's scale and of norm_weight; adds that of the slots to g_h.

    Overwrites g_coefficients [k, T, n].
    """
    assert p.dynamic_weight is not None
    t, z, s, r, v = predicted
    g_z, scales, g_scales = g_coefficients, _scales(p), None
    product = g_z * t if p.tanh or scales is not None else g_z
    if p.tanh:
        g_z.addcmul_(product, t, value=-1)  # tanh' = 1 - t^2
    if scales is not None:
        g_scales = product.sum((1, 2))
        g_z *= scales
    if r is not None:
        g_z *= r
        # Through r: dr/ds = -r^3 s / c, and sum_k g_z <v, s> is known from z.
        pull = (g_z * z).sum(0).mul_(r).div_(-v.shape[1])
        g_h.view(s.shape).addcmul_(s, pull.unsqueeze(-1))
    g_z = g_z.flatten(1)
    g_h.addmm_(g_z.t(), v)
    g_v = g_z @ s.flatten(0, 1)
    if p.norm_weight is None:
        return g_v, g_scales, None
    return g_v * p.norm_weight, g_scales, (g_v * p.dynamic_weight).sum(0)


def _dynamic(table: Tensor, p: Operands) -> Tensor:
    """The rows of a table [k, ...] that are dynamic: all, that of beta, or those of gamma and alpha."""
    assert p.dynamic_weight is not None
    rows = p.dynamic_weight.shape[0]
    if rows == table.shape[0]:
        return table
    return table[:1] if rows == 1 else table[1:]


def _scales(p: Operands) -> Tensor | None:
    """Of every dynamic coefficient, [k, 1, 1]."""
    of_alpha = None if p.scale_alpha is None else p.scale_alpha.expand(p.fractions + p.slots)
    parts = [part for part in (p.scale_beta, of_alpha) if part is not None]
    return torch.cat(parts).view(-1, 1, 1) if parts else None


def _tanh(z: Tensor) -> Tensor:
    """tanh(z) = 1 - 2 sigmoid(-2z): twice as fast as torch.tanh on CPUs, 0 at 0, within 1e-7 everywhere (fp32)."""
    return torch.rsub((-2 * z).sigmoid_(), 1, alpha=2)
