"""Frac-Connections as hand-written torch operations, forward and backward: the `torch` backend.

The operator of `megatron_fc.functional` in fewer passes over the stream, without autograd. Streams are [T, d] with
d = m*c. One product predicts all k = 2m+1 coefficients of every fraction. Coefficients, mixing and gradients are
computed in fp32, or in fp64 for an fp64 stream.
"""

from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc.config import FracConfig
from megatron_fc.functional import FracParameters, fractions


@torch.no_grad()
def width_forward(
    h: Tensor, p: FracParameters, config: FracConfig, want_x: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Width connection, x_j = sum_i gamma_ij h_i, and the coefficients that the depth connection needs.

    Args:
        h: residual stream [T, d].
        want_x: False leaves x out.

    Returns:
        x [T, d] in the dtype of h or None; beta [T, m] and alpha [T, m*m], row-major, in fp32.
    """
    m, tokens = config.rate, h.shape[0]
    f, p = fractions(h, m), _in_fp32(p, h)
    coefficients = _coefficients(_predict(f, p, config).t if config.dynamic else None, p, config, tokens)
    beta, gamma, alpha = coefficients.split((1, m, m))
    # Copies, for one token or fraction too: an operation may not return two views of one storage.
    beta, alpha = beta[0].clone(), alpha.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).flatten(1)
    x = _mix(gamma.transpose(0, 1), f).to(h.dtype) if want_x else None
    return x, beta, alpha


@torch.no_grad()
def width_backward(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, p: FracParameters, config: FracConfig
) -> tuple[Tensor, FracParameters]:
    """Gradients of the stream and of the parameters; the coefficients are computed again from h.

    Args:
        g_x: gradient of x [T, d]. None stands for zero, here and below.
        g_beta: gradient of beta [T, m].
        g_mixed: gradient of the mixed residual sum_i alpha_ij h_i [T, d].
        h: residual stream [T, d].

    Returns:
        Gradient of h [T, d] in the dtype of h; of the parameters in their dtypes, None where p has None.
    """
    m, tokens = config.rate, h.shape[0]
    f, given, p = fractions(h, m), p, _in_fp32(p, h)
    # Gamma and alpha act alike on h, so their gradients go side by side: [T, 2m, c].
    g = f.new_empty(tokens, 2 * m, f.shape[-1])
    g[:, :m] = 0 if g_x is None else g_x.view_as(f)
    g[:, m:] = 0 if g_mixed is None else g_mixed.view_as(f)
    # That of the weight from h_i is <h_i, g_j>. Laid out as the prediction: [k, T, source].
    products = _matmul(g, f.transpose(1, 2))
    g_coefficients = f.new_empty(2 * m + 1, tokens, m)
    g_coefficients[0] = 0 if g_beta is None else g_beta
    g_coefficients[1:] = products.transpose(0, 1)
    g_gamma, g_alpha = (half.sum(0).t().flatten() for half in products.split(m, 1))
    gradients: tuple[Tensor | None, ...] = (g_coefficients[0].sum(0), g_gamma, g_alpha)

    predicted = _predict(f, p, config) if config.dynamic else None
    coefficients = _coefficients(None if predicted is None else predicted.t, p, config, tokens)
    g_h = _mix(coefficients[1:].permute(1, 2, 0), g)
    if predicted is not None:
        gradients += _predict_backward(g_coefficients, g_h.view(-1, f.shape[-1]), predicted, p, config)
    in_their_dtypes = (g if q is None or g is None else g.to(q.dtype) for g, q in zip_longest(gradients, given))
    return g_h.to(h.dtype), FracParameters._make(in_their_dtypes)


@torch.no_grad()
def depth_forward(o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """Depth connection, h'_j = beta_j o_j + sum_i alpha_ij h_i.

    Args:
        o: sub-layer's output [T, d], in the dtype of h or a lower one.
        h: residual stream [T, d].
        beta, alpha: [T, m] and [T, m*m] of `width_forward`.

    Returns:
        Next residual stream [T, d] in the dtype of h.
    """
    m = beta.shape[-1]
    mixed = _mix(alpha.view(-1, m, m).transpose(1, 2), fractions(h, m))
    mixed.view(-1, m, h.shape[-1] // m).addcmul_(beta.unsqueeze(-1), o.unflatten(-1, (m, -1)))
    return mixed.to(h.dtype)


@torch.no_grad()
def depth_backward(g: Tensor, o: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sub-layer's output and of beta; that of the mixed residual is g itself.

    Args:
        g: gradient of the next residual stream [T, d].
        o: sub-layer's output [T, d].
        beta: [T, m] of `width_forward`.

    Returns:
        Gradient of o [T, d] in the dtype of o; of beta [T, m] in fp32.
    """
    fractions_of_g = fractions(g, beta.shape[-1])
    products = fractions_of_g * o.view_as(fractions_of_g)
    g_beta = products.sum(-1)
    g_o = torch.mul(fractions_of_g, beta.unsqueeze(-1), out=products)
    return g_o.view(g.shape).to(o.dtype), g_beta


class _Prediction(NamedTuple):
    """The dynamic part of the coefficients before its scale, t = tanh(z) with z = r <v, fraction>; for backward, how.

    With k first, the product is fastest and what follows broadcasts along rows of T*m elements.
    """

    t: Tensor  # [k, T, m]
    z: Tensor  # [k, T*m]
    fractions: Tensor  # [T*m, c], centred under layernorm
    r: Tensor | None  # [T*m], 1 / their root mean square
    v: Tensor  # [k, c], dynamic_weight times norm_weight: no normalised copy of h is needed


def _predict(f: Tensor, p: FracParameters, config: FracConfig) -> _Prediction:
    assert p.dynamic_weight is not None
    rows, v, r = f.flatten(0, 1), p.dynamic_weight, None
    if p.norm_weight is not None:
        v = v * p.norm_weight
        if config.norm == "layernorm":  # which is rmsnorm of what is centred; so is v, for backward
            rows, v = rows - rows.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        r = torch.linalg.vector_norm(rows, dim=-1).square_().div_(v.shape[-1]).add_(config.norm_eps).rsqrt_()
    z = _matmul(v, rows.t())
    if r is not None:
        z *= r
    t = _tanh(z) if config.tanh else z
    return _Prediction(t.view(len(v), *f.shape[:2]), z, rows, r, v)


def _predict_backward(
    g_coefficients: Tensor, g_h: Tensor, predicted: _Prediction, p: FracParameters, config: FracConfig
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of dynamic_weight, scale_beta, scale_alpha and norm_weight; adds that of the fractions to g_h [T*m, c].

    Overwrites g_coefficients [k, T, m].
    """
    assert p.dynamic_weight is not None
    z, rows, r, v = predicted[1:]
    t, g_z = predicted.t.view_as(z), g_coefficients.view_as(z)
    product = g_z * t if config.tanh or config.scale else g_z
    g_scales = product.sum(1) if config.scale else None
    if config.tanh:
        g_z.addcmul_(product, t, value=-1)  # tanh' = 1 - t^2
    if p.scale_beta is not None and p.scale_alpha is not None:
        g_z[0] *= p.scale_beta
        g_z[1:] *= p.scale_alpha
    if r is not None:
        g_z *= r
        # Through r: dr/df = -r^3 f / c, and sum_k g_z <v, f> is known from z.
        pull = (g_z * z).sum(0).mul_(r).div_(-v.shape[-1])
        g_h.addcmul_(rows, pull.unsqueeze(-1))
    g_h.addmm_(g_z.t(), v)
    g_v = _matmul(g_z, rows)
    return (
        g_v if p.norm_weight is None else g_v * p.norm_weight,
        None if g_scales is None else g_scales[:1],
        None if g_scales is None else g_scales[1:].sum(0, keepdim=True),
        None if p.norm_weight is None else (g_v * p.dynamic_weight).sum(0),
    )


def _coefficients(t: Tensor | None, p: FracParameters, config: FracConfig, tokens: int) -> Tensor:
    """Static plus scaled dynamic part of beta, gamma and alpha, laid out as the prediction: [k, T, source]."""
    m = config.rate
    static = torch.cat((p.static_beta, *(s.view(m, m).t().flatten() for s in (p.static_gamma, p.static_alpha))))
    static = static.view(2 * m + 1, 1, m)
    if t is None:
        return static.expand(-1, tokens, -1)
    if p.scale_beta is None or p.scale_alpha is None:
        return static + t
    scale = torch.cat((p.scale_beta, p.scale_alpha.expand(2 * m))).view(-1, 1, 1)
    return torch.addcmul(static, t, scale)


def _mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Per token, `weights` [T, out, in] times `rows` [T, in, c] -> [T, out*c].

    A bag of weighted rows per output. On CPUs it moves every row once, in SIMD, where a batched matrix product is bound
    by its cost per token. TF32 never touches it, which would round coefficients like 1 + 0.01 t.
    """
    tokens, outputs, inputs = weights.shape
    # Kept on CPUs, where making them costs as much as using them. Not what a CUDA graph or a fake mode allocates.
    bags = _kept_bags if rows.device.type == "cpu" and type(rows) is Tensor else _bags
    index, starts = bags(tokens, outputs, inputs, rows.device)
    # Detached, or a stream that requires gradients would have it prepare for a backward of its own.
    table, flat = rows.detach().flatten(0, 1), weights.reshape(-1)
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=flat).view(
        tokens, outputs * rows.shape[-1]
    )


def _bags(tokens: int, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers of all bags of `_mix`, and where each bag starts."""
    rows = torch.arange(tokens * inputs, device=device).view(tokens, 1, inputs).expand(-1, outputs, -1)
    return rows.reshape(-1), torch.arange(0, tokens * outputs * inputs, inputs, device=device)


_kept_bags = lru_cache(maxsize=8)(_bags)


def _tanh(z: Tensor) -> Tensor:
    """tanh(z) = 1 - 2 sigmoid(-2z): twice as fast as torch.tanh on CPUs, 0 at 0, within 1e-7 everywhere (fp32)."""
    return torch.rsub((-2 * z).sigmoid_(), 1, alpha=2)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _in_fp32(p: FracParameters, h: Tensor) -> FracParameters:
    dtype = torch.promote_types(h.dtype, torch.float32)
    return FracParameters._make(None if q is None else q.to(dtype) for q in p)
