"""The family of connections as hand-written torch operations, forward and backward: the `torch` backend.

The operator of `reference` in fewer passes over the stream, without autograd. Streams are [..., n*c] of T tokens, a
sub-layer's input and output [..., d] with d = m*c. `eager_per_slot` and `eager_on_manifold` have the coefficients.
Coefficients, mixing and gradients are computed in fp32, or in fp64 for an fp64 stream.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc.connections import eager_on_manifold, eager_per_slot
from megatron_fc.connections.operands import AnyOperands, Operands, refuse_low_precision

_unsafe_view = torch.ops.aten._unsafe_view.default


def as_written[**Arguments, Result](function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
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


class Coefficients(NamedTuple):
    """What a site predicts for T tokens, in fp32: the row of a table is the source slot, the column the destination.

    Shapes: beta [T, n], gamma [T, n, m], alpha [T, n, n].
    """

    beta: Tensor
    gamma: Tensor
    alpha: Tensor


@as_written
def coefficients(h: Tensor, p: AnyOperands) -> Coefficients:
    """Coefficients of a site for a stream [..., n*c]; of one that is zero what they are without data."""
    refuse_low_precision(p)
    s, p = _slots(h, p.slots), in_fp32(p, h)
    beta, gamma, alpha = _of(p).coefficients(s, p)[0].split((1, p.fractions, p.slots))
    return Coefficients(beta[0], gamma.permute(1, 2, 0), alpha.permute(1, 2, 0))


@as_written
def width_forward(h: Tensor, p: AnyOperands, want_x: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """Width connection, x_i = sum_j gamma_ji h_j, and the coefficients that the depth connection needs.

    Args:
        h: stream [..., n*c].
        p: the site.
        want_x: False leaves x out.

    Returns:
        x [..., d] in the dtype of h or None; beta [T, n] and alpha [T, n*n], row-major, in fp32.
    """
    refuse_low_precision(p)
    n, m = p.slots, p.fractions
    s, p = _slots(h, n), in_fp32(p, h)
    table, _ = _of(p).coefficients(s, p)
    beta, gamma, alpha = table.split((1, m, n))
    x = _shaped(_mix(gamma.transpose(0, 1), s), (*h.shape[:-1], m * s.shape[2]), h) if want_x else None
    # A copy, since beta is kept for backward and would keep all coefficients with it.
    return x, beta[0].clone(), alpha.permute(1, 2, 0).reshape(s.shape[0], n * n)


@as_written
def width_backward(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, p: AnyOperands
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Gradients of the stream and of the parameters; the coefficients are computed again from h.

    Args:
        g_x: gradient of x [..., d]. None stands for zero, here and below.
        g_beta: gradient of beta [T, n].
        g_mixed: gradient of the mixed residual sum_k alpha_kj h_k [..., n*c].
        h: stream [..., n*c].
        p: the site.

    Returns:
        Gradient of h [..., n*c] in the dtype of h; of the parameters in their dtypes, None where p has None.
    """
    n, m, given = p.slots, p.fractions, p.parameters
    s, p = _slots(h, n), in_fp32(p, h)
    tokens, _, c = s.shape
    # Gamma and alpha act alike on h, so their gradients go side by side: [T, m+n, c].
    sides = [
        s.new_zeros(tokens, count, c) if g is None else g.reshape(tokens, count, c)
        for g, count in ((g_x, m), (g_mixed, n))
    ]
    g = torch.cat(sides, 1, out=s.new_empty(tokens, m + n, c))
    g_beta = s.new_zeros(tokens, n) if g_beta is None else g_beta
    # That of the weight from h_i is <h_i, g_j>.
    products = s @ g.transpose(1, 2)
    of = _of(p)
    table, kept = of.coefficients(s, p)
    g_h = _mix(table[1:].permute(1, 2, 0), g)
    gradients = of.coefficients_backward(g_beta, products, g_h, kept, p)
    in_their_dtypes = (g if q is None or g is None else g.to(q.dtype) for g, q in zip(gradients, given, strict=True))
    return g_h.view(h.shape).to(h.dtype), type(given)(*in_their_dtypes)


@as_written
def depth_forward(o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """Depth connection, h'_j = beta_j o_((j-1) mod m + 1) + sum_k alpha_kj h_k.

    Args:
        o: sub-layer's output [..., d], in the dtype of h or a lower one.
        h: stream [..., n*c].
        beta, alpha: [T, n] and [T, n*n] of `width_forward`.

    Returns:
        Next stream [..., n*c] in the dtype of h.
    """
    tokens, n = beta.shape
    s = _slots(h, n)
    mixed = _mix(alpha.view(tokens, n, n).transpose(1, 2), s)
    turns, m, c = _turns(s, o)
    mixed.view(tokens, turns, m, c).addcmul_(beta.view(tokens, turns, m, 1), o.reshape(tokens, 1, m, c))
    return _shaped(mixed, h.shape, h)


@as_written
def depth_backward(g: Tensor, o: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sub-layer's output and of beta; that of the mixed residual is g itself.

    Args:
        g: gradient of the next stream [..., n*c].
        o: sub-layer's output [..., d].
        beta: [T, n] of `width_forward`.

    Returns:
        Gradient of o [..., d] in the dtype of o; of beta [T, n] in fp32.
    """
    tokens, n = beta.shape
    s = _slots(g, n)
    turns, m, c = _turns(s, o)
    s = s.view(tokens, turns, m, c)
    products = s * o.reshape(tokens, 1, m, c)
    g_beta = products.sum(-1).view(tokens, n)
    if turns == 1:
        g_o = torch.mul(s, beta.view(tokens, 1, m, 1), out=products)
    else:
        written = torch.eye(m, dtype=s.dtype, device=s.device).repeat(1, turns)  # [m, n]
        g_o = _mix(beta.unsqueeze(1) * written, s.view(tokens, n, c))
    return g_o.view(o.shape).to(o.dtype), g_beta


def _of(p: AnyOperands) -> Any:
    """The coefficients of a site."""
    return eager_per_slot if isinstance(p, Operands) else eager_on_manifold


def _turns(s: Tensor, o: Tensor) -> tuple[int, int, int]:
    """n/m, m and c: slots [T, n, c] are the turns in which the m fractions of a sub-layer's output are written."""
    _, n, c = s.shape
    m = o.shape[-1] // c
    return n // m, m, c


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


def _slots(stream: Tensor, count: int) -> Tensor:
    """[..., n*c] -> [T, n, c], upcast to at least fp32."""
    s = stream.reshape(-1, count, stream.shape[-1] // count)
    return s if s.dtype.itemsize >= torch.float32.itemsize else s.float()


def _shaped(rows: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Rows of slots in another shape, in the dtype of a stream; no view to autograd, which forbids to write to one."""
    return _unsafe_view(rows, shape).to(like.dtype)


def in_fp32[Site: AnyOperands](p: Site, h: Tensor) -> Site:
    """Tensors in the dtype of the slots, where they are not."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    if p[0].dtype == dtype:
        return p
    values: Any = (q.to(dtype) if isinstance(q, Tensor) else q for q in p)
    return type(p)(*values)
