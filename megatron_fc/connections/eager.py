"""Frac-Connections as hand-written torch operations, forward and backward: the `torch` backend.

The operator of `reference` in fewer passes over the stream, without autograd. Streams are [..., d] with d = m*c, of T
tokens in all. One product predicts all k = 2m+1 coefficients of every fraction. Coefficients, mixing and
gradients are computed in fp32, or in fp64 for an fp64 stream.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc.connections.operands import Operands
from megatron_fc.connections.reference import FracParameters

_unsafe_view = torch.ops.aten._unsafe_view.default


def _as_written[**Arguments, Result](function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run it without autograd and without autocast, which would round coefficients.

    And unseen by what overrides torch functions: asked for each of dozens of calls, the CPU lane's mode takes as long
    as a tenth of them.
    """

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return function(*args, **kwargs)
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)

    return run


@_as_written
def width_forward(h: Tensor, p: Operands, want_x: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """Width connection, x_j = sum_i gamma_ij h_i, and the coefficients that the depth connection needs.

    Args:
        h: residual stream [..., d].
        p: the site.
        want_x: False leaves x out.

    Returns:
        x [..., d] in the dtype of h or None; beta [T, m] and alpha [T, m*m], row-major, in fp32.
    """
    p.refuse_low_precision()
    m = p.rate
    f, p = _fractions(h, m), _in_fp32(p, h)
    beta, gamma, alpha = _coefficients(_predict(f, p), p, f.shape[0]).split((1, m, m))
    x = _shaped(_mix(gamma.transpose(0, 1), f), h) if want_x else None
    # A copy, since beta is kept for backward and would keep all coefficients with it.
    return x, beta[0].clone(), alpha.permute(1, 2, 0).reshape(f.shape[0], m * m)


@_as_written
def width_backward(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, p: Operands
) -> tuple[Tensor, FracParameters]:
    """Gradients of the stream and of the parameters; the coefficients are computed again from h.

    Args:
        g_x: gradient of x [..., d]. None stands for zero, here and below.
        g_beta: gradient of beta [T, m].
        g_mixed: gradient of the mixed residual sum_i alpha_ij h_i [..., d].
        h: residual stream [..., d].
        p: the site.

    Returns:
        Gradient of h [..., d] in the dtype of h; of the parameters in their dtypes, None where p has None.
    """
    m, given = p.rate, p.parameters
    f, p = _fractions(h, m), _in_fp32(p, h)
    # Gamma and alpha act alike on h, so their gradients go side by side: [T, 2m, c].
    halves = [f.new_zeros(f.shape) if g is None else g.reshape(f.shape) for g in (g_x, g_mixed)]
    g = torch.cat(halves, 1, out=f.new_empty(f.shape[0], 2 * m, f.shape[2]))
    g_beta = f.new_zeros(f.shape[0], m) if g_beta is None else g_beta
    # That of the weight from h_i is <h_i, g_j>.
    products = f @ g.transpose(1, 2)
    statics = (half.sum(0).flatten() for half in products.split(m, 2))
    gradients: tuple[Tensor | None, ...] = (g_beta.sum(0), *statics)

    predicted = _predict(f, p)
    coefficients = _coefficients(predicted, p, f.shape[0])
    g_h = _mix(coefficients[1:].permute(1, 2, 0), g)
    if predicted is not None:
        g_coefficients = torch.cat((g_beta.unsqueeze(0), products.permute(2, 0, 1)))
        gradients += _predict_backward(g_coefficients, g_h, predicted, p)
    in_their_dtypes = (g if q is None or g is None else g.to(q.dtype) for g, q in zip_longest(gradients, given))
    return g_h.view(h.shape).to(h.dtype), FracParameters._make(in_their_dtypes)


@_as_written
def depth_forward(o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """Depth connection, h'_j = beta_j o_j + sum_i alpha_ij h_i.

    Args:
        o: sub-layer's output [..., d], in the dtype of h or a lower one.
        h: residual stream [..., d].
        beta, alpha: [T, m] and [T, m*m] of `width_forward`.

    Returns:
        Next residual stream [..., d] in the dtype of h.
    """
    tokens, m = beta.shape
    mixed = _mix(alpha.view(tokens, m, m).transpose(1, 2), _fractions(h, m))
    mixed.addcmul_(beta.view(-1, 1), o.reshape(mixed.shape))
    return _shaped(mixed, h)


@_as_written
def depth_backward(g: Tensor, o: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sub-layer's output and of beta; that of the mixed residual is g itself.

    Args:
        g: gradient of the next residual stream [..., d].
        o: sub-layer's output [..., d].
        beta: [T, m] of `width_forward`.

    Returns:
        Gradient of o [..., d] in the dtype of o; of beta [T, m] in fp32.
    """
    f = _fractions(g, beta.shape[1])
    products = f * o.reshape(f.shape)
    g_beta = products.sum(-1)
    g_o = torch.mul(f, beta.unsqueeze(-1), out=products)
    return g_o.view(o.shape).to(o.dtype), g_beta


class _Prediction(NamedTuple):
    """The dynamic part of the coefficients before its scale, t = tanh(z) with z = r <v, fraction>; for backward, how.

    With k first, the product is fastest and what follows broadcasts along rows of T*m elements.
    """

    t: Tensor  # [k, T, m]
    z: Tensor  # [k, T, m]
    fractions: Tensor  # [T, m, c], centred under layernorm
    r: Tensor | None  # [T, m], 1 / their root mean square
    v: Tensor  # [k, c], dynamic_weight times norm_weight: no normalised copy of h is needed


def _predict(f: Tensor, p: Operands) -> _Prediction | None:
    v, r = p.dynamic_weight, None
    if v is None:
        return None
    if p.norm_weight is not None:
        v = v * p.norm_weight
        if p.norm == "layernorm":  # which is rmsnorm of what is centred; so is v, for backward
            f, v = f - f.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        r = torch.linalg.vector_norm(f, dim=-1).square_().div_(v.shape[1]).add_(p.norm_eps).rsqrt_()
    z = (v @ f.flatten(0, 1).t()).view(len(v), *f.shape[:2])
    if r is not None:
        z *= r
    return _Prediction(_tanh(z) if p.tanh else z, z, f, r, v)


def _predict_backward(
    g_coefficients: Tensor, g_h: Tensor, predicted: _Prediction, p: Operands
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of dynamic_weight, scale_beta, scale_alpha and norm_weight; adds that of the fractions to g_h [T*m, c].

    Overwrites g_coefficients [k, T, m].
    """
    assert p.dynamic_weight is not None
    t, z, f, r, v = predicted
    g_z, scales, g_scales = g_coefficients, _scales(p), None
    product = g_z * t if p.tanh or scales is not None else g_z
    if p.tanh:
        g_z.addcmul_(product, t, value=-1)  # tanh' = 1 - t^2
    if scales is not None:
        g_scales = product.sum((1, 2))
        g_z *= scales
    if r is not None:
        g_z *= r
        # Through r: dr/df = -r^3 f / c, and sum_k g_z <v, f> is known from z.
        pull = (g_z * z).sum(0).mul_(r).div_(-v.shape[1])
        g_h.view(f.shape).addcmul_(f, pull.unsqueeze(-1))
    g_z = g_z.flatten(1)
    g_h.addmm_(g_z.t(), v)
    g_v = g_z @ f.flatten(0, 1)
    return (
        g_v if p.norm_weight is None else g_v * p.norm_weight,
        None if g_scales is None else g_scales[:1],
        None if g_scales is None else g_scales[1:].sum(0, keepdim=True),
        None if p.norm_weight is None else (g_v * p.dynamic_weight).sum(0),
    )


def _coefficients(predicted: _Prediction | None, p: Operands, tokens: int) -> Tensor:
    """Static plus scaled dynamic part of beta, gamma and alpha, laid out as the prediction: [k, T, source]."""
    m = len(p.static_beta)
    by_target = [s.view(m, m).t() for s in (p.static_gamma, p.static_alpha)]
    static = torch.cat((p.static_beta.unsqueeze(0), *by_target)).unsqueeze(1)
    if predicted is None:
        return static.expand(-1, tokens, -1)
    scales = _scales(p)
    return static + predicted.t if scales is None else torch.addcmul(static, predicted.t, scales)


def _scales(p: Operands) -> Tensor | None:
    """Of every coefficient, [k, 1, 1]."""
    if p.scale_beta is None or p.scale_alpha is None:
        return None
    return torch.cat((p.scale_beta, p.scale_alpha.expand(2 * len(p.static_beta)))).view(-1, 1, 1)


def _mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Per token, `weights` [T, out, in] times `rows` [T, in, c] -> [T*out, c].

    A bag of weighted rows per output. On CPUs it moves every row once, in SIMD, where a batched matrix product is bound
    by its cost per token. TF32 never touches it, which would round coefficients like 1 + 0.01 t.
    """
    # Kept on CPUs, where making them costs as much as using them. Not what a CUDA graph or a fake mode allocates.
    bags = _kept_bags if rows.device.type == "cpu" and type(rows) is Tensor else _bags
    tokens, outputs, inputs = weights.shape
    index, starts = bags(tokens, outputs, inputs, rows.device)
    # Detached, or a stream that requires gradients would have it prepare for a backward of its own.
    table, flat = rows.detach().flatten(0, 1), weights.reshape(-1)
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=flat)


def _bags(tokens: int, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers of all bags of `_mix`, and where each bag starts."""
    rows = torch.arange(tokens * inputs, device=device).view(tokens, 1, inputs).expand(-1, outputs, -1)
    return rows.reshape(-1), torch.arange(0, tokens * outputs * inputs, inputs, device=device)


_kept_bags = lru_cache(maxsize=8)(_bags)


def _tanh(z: Tensor) -> Tensor:
    """tanh(z) = 1 - 2 sigmoid(-2z): twice as fast as torch.tanh on CPUs, 0 at 0, within 1e-7 everywhere (fp32)."""
    return torch.rsub((-2 * z).sigmoid_(), 1, alpha=2)


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """[T*m, c] -> [..., d] in the dtype of a stream; no view to autograd, which forbids to write to one."""
    return _unsafe_view(rows, like.shape).to(like.dtype)


def _fractions(stream: Tensor, rate: int) -> Tensor:
    """[..., d] -> [T, m, c], upcast to at least fp32."""
    f = stream.reshape(-1, rate, stream.shape[-1] // rate)
    return f if f.dtype.itemsize >= torch.float32.itemsize else f.float()


def _in_fp32(p: Operands, h: Tensor) -> Operands:
    """Tensors in the dtype of the fractions, where they are not."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    if p.static_beta.dtype == dtype:
        return p
    return Operands._make(q.to(dtype) if isinstance(q, Tensor) else q for q in p)
