"""The fused kernels as torch.library custom ops: what torch.compile and autograd see of them.

For backward are kept: h (width), o and beta (depth); the coefficients gamma and alpha are computed again.
"""

from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.handover import Handover, without_storage
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.once import differentiated_once
from megatron_fc.connections.operands import N_OPERANDS, N_PARAMETERS, AnyOperands, Operands
from megatron_fc.connections.parcel import values_of

_SITE = (
    "Tensor static_beta, Tensor static_gamma, Tensor static_alpha, Tensor? dynamic_weight, Tensor? scale_beta, "
    "Tensor? scale_alpha, Tensor? norm_weight, int fractions, str norm, bool tanh, float norm_eps"
)
NORM = "Tensor? sub_weight, Tensor? sub_bias, str sub_norm, float sub_eps, bool one_plus"
_DEPTH = "Tensor o, Tensor h, Tensor beta, Tensor alpha, Tensor mixed, Tensor? bias, Tensor? seed, float dropout"
_N_NORM, _N_DEPTH = 5, 8


def width(h: Tensor, p: Operands, norm: NormWeights | None, want_x: bool = True) -> tuple[Tensor, Handover]:
    """Width connection: x or norm(x) [..., d] (empty without want_x), and what the depth connection takes over."""
    x, beta, alpha, mixed = _width(h, *p, *norm_values(norm), want_x)
    return x, Handover(beta, alpha, mixed, "triton")


def depth(
    o: Tensor,
    h: Tensor,
    handover: Handover,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Depth connection: the next stream [..., n*c] in the dtype of h."""
    following: Tensor = _depth(o, h.detach(), *handover.tensors, bias, seed, dropout)
    return following


class Prepared(NamedTuple):
    """What a width connection will make, as plain values without gradient, and of which parameters' values.

    Good for one call, which puts x and beta into its graph.
    """

    x: Tensor
    beta: Tensor
    alpha: Tensor
    values: tuple[Any, ...]


def boundary(
    o: Tensor,
    h: Tensor,
    handover: Handover,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    p: Operands,
    norm: NormWeights | None,
) -> tuple[Tensor, Prepared]:
    """Depth connection of one site, and in the same pass the values of the next one's width connection: h', those."""
    depth = (o, h.detach(), *handover.tensors, bias, seed, dropout)
    # In a tuple, which autograd does not look into: h' does not depend on the next site.
    h, x, beta, alpha = _BoundaryDepth.apply(*depth, (*p, *norm_values(norm)))
    return h, Prepared(x, beta, alpha, _values(p, norm))


def prepared_width(
    h: Tensor, prepared: Prepared, p: Operands, norm: NormWeights | None
) -> tuple[Tensor, Handover] | None:
    """`width` of a boundary's h', where its values are there already; None if parameters have others by now."""
    if prepared.values != _values(p, norm):
        return None
    x, beta, mixed = _PreparedWidth.apply(h, prepared, *p, *norm_values(norm))
    return x, Handover(beta, prepared.alpha, mixed, "triton")


def _values(p: Operands, norm: NormWeights | None) -> tuple[Any, ...]:
    return values_of(*p.parameters, *((None, None) if norm is None else (norm.weight, norm.bias)))


def norm_values(norm: NormWeights | None) -> tuple[Any, ...]:
    return (
        (None, None, "none", 1.0, False)
        if norm is None
        else (norm.weight, norm.bias, norm.kind, norm.eps, norm.one_plus)
    )


def norm_of(values: tuple[Any, ...]) -> NormWeights | None:
    """As the kernels take it, which read memory as it lies."""
    weight, bias, kind, eps, one_plus = values
    return None if kind == "none" else NormWeights(kind, weight.contiguous(), contiguous(bias), eps, one_plus)


def _site_of(values: tuple[Any, ...]) -> Operands:
    """As the kernels take it."""
    return Operands._make((*map(contiguous, values[:N_PARAMETERS]), *values[N_PARAMETERS:]))


def _kernels() -> ModuleType:
    from megatron_fc.connections.kernels import launch

    return launch


def coefficients_like(h: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dtype = prod(h.shape[:-1]), torch.promote_types(h.dtype, torch.float32)
    return h.new_empty(tokens, slots, dtype=dtype), h.new_empty(tokens, slots * slots, dtype=dtype), without_storage(h)


def input_like(h: Tensor, p: AnyOperands) -> Tensor:
    """x of a stream [..., n*c], [..., d]."""
    return h.new_empty(*h.shape[:-1], h.shape[-1] // p.slots * p.fractions)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def present(tensors: Any) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


# Width connection.


def _width_impl(h: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, norm, want_x = _site_of(values[:N_OPERANDS]), norm_of(values[N_OPERANDS:-1]), values[-1]
    x, beta, alpha = _kernels().width_forward(h.contiguous(), p, norm, want_x)
    return h.new_empty(0) if x is None else x, beta, alpha, without_storage(h)


def _width_fake(h: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = Operands(*values[:N_OPERANDS])
    return input_like(h, p) if values[-1] else h.new_empty(0), *coefficients_like(h, p.slots)


def _width_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, *values = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    tensors = (h, *values[:N_PARAMETERS], *values[N_OPERANDS : N_OPERANDS + 2])
    ctx.save_for_backward(*tensors)
    ctx.values = (values[N_PARAMETERS:N_OPERANDS], values[N_OPERANDS + 2 : N_OPERANDS + _N_NORM])


@differentiated_once
def _width_grad(ctx: Any, g_x: Tensor | None, g_beta: Tensor | None, _: Any, g_mixed: Tensor | None) -> tuple[Any, ...]:
    h, *tensors = ctx.saved_tensors
    site, norm = ctx.values
    values = (*tensors[:N_PARAMETERS], *site, *tensors[N_PARAMETERS:], *norm)
    if g_x is not None and not g_x.shape[-1]:  # of the x that nobody wanted
        g_x = None
    g_h, *gradients = _width_backward(g_x, g_beta, g_mixed, h, *values)
    return (g_h, *_placed(gradients, tensors, g_x is not None), None)


def _placed(gradients: list[Tensor], tensors: list[Any], normed: bool) -> tuple[Any, ...]:
    """Gradients at the places of the tensors that they belong to, None at the places of other values."""
    rest = iter(gradients)
    site = [None if tensor is None else next(rest) for tensor in tensors[:N_PARAMETERS]]
    norm = [None if tensor is None or not normed else next(rest) for tensor in tensors[N_PARAMETERS:]]
    return (*site, *[None] * (N_OPERANDS - N_PARAMETERS), *norm, *[None] * (_N_NORM - 2))


def _width_backward_impl(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, *values: Any
) -> list[Tensor]:
    p, norm = _site_of(values[:N_OPERANDS]), norm_of(values[N_OPERANDS:])
    g, gradients = _kernels().width_backward(*map(contiguous, (g_x, g_beta, g_mixed)), h.contiguous(), p, norm)
    return [g, *present(gradients)]


def _width_backward_fake(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, *values: Any
) -> list[Tensor]:
    norm = values[N_OPERANDS : N_OPERANDS + 2] if g_x is not None else ()
    stream = torch.empty_like(h, memory_format=torch.contiguous_format)
    return [stream, *(torch.empty_like(tensor) for tensor in present((*values[:N_PARAMETERS], *norm)))]


# Depth connection.


def _depth_impl(o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor, mixed: Tensor, *values: Any) -> Tensor:
    launch = _kernels()
    bias, *dropout = values
    depth = launch.DepthInputs(*map(contiguous, (o, h, beta, alpha, bias)), *dropout)
    return launch.depth_forward(depth)


def _depth_fake(o: Tensor, h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _depth_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, _, beta, _, _, bias, seed, ctx.dropout = inputs
    ctx.save_for_backward(o, beta, bias, seed)


@differentiated_once
def _depth_grad(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    o, beta, bias, seed = ctx.saved_tensors
    g_o, g_beta, *g_bias = _depth_backward(g, o, beta, bias, seed, ctx.dropout)
    return g_o, None, g_beta, None, g, *(g_bias or [None]), None, None


def _depth_backward_impl(g: Tensor, o: Tensor, beta: Tensor, *values: Any) -> list[Tensor]:
    launch = _kernels()
    bias, *dropout = values
    depth = launch.DepthInputs(o.contiguous(), None, beta.contiguous(), None, contiguous(bias), *dropout)
    return present(launch.depth_backward(g.contiguous(), depth))


def _depth_backward_fake(g: Tensor, o: Tensor, beta: Tensor, bias: Tensor | None, *_: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in present((o, beta, bias))]


# Boundary.


def _boundary_impl(*values: Any) -> tuple[Tensor, ...]:
    o, h, beta, alpha, _, bias, seed, dropout = values[:_N_DEPTH]
    p, norm = _site_of(values[_N_DEPTH : _N_DEPTH + N_OPERANDS]), norm_of(values[_N_DEPTH + N_OPERANDS :])
    launch = _kernels()
    depth = launch.DepthInputs(*map(contiguous, (o, h, beta, alpha, bias)), seed, dropout)
    results: tuple[Tensor, ...] = launch.boundary_forward(depth, p, norm)
    return results


def _boundary_fake(*values: Any) -> tuple[Tensor, ...]:
    stream = torch.empty_like(values[1], memory_format=torch.contiguous_format)
    p = Operands(*values[_N_DEPTH : _N_DEPTH + N_OPERANDS])
    return stream, input_like(stream, p), *coefficients_like(stream, p.slots)[:2]


class _BoundaryDepth(torch.autograd.Function):
    """The depth connection's part of a boundary in the graph: from o and the mixed residual to h'.

    The two parts are nodes of their own with h' between them, so that whoever looks at h' (a hook, `retain_grad`,
    `torch.autograd.grad`) finds its gradient there. One kernel makes both backward passes all the same: the width
    connection's node, which comes first, leaves the results here, together with the gradient of h' that they are of.
    """

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, ...]:
        o, _, beta, _, _, bias, seed, ctx.dropout = depth = values[:_N_DEPTH]
        h, x, next_beta, next_alpha = _boundary(*depth, *values[_N_DEPTH])
        ctx.set_materialize_grads(False)  # of what has none: rows of zeros
        ctx.mark_non_differentiable(x, next_beta, next_alpha)
        ctx.save_for_backward(o, beta, bias, seed)
        ctx.made = None
        return h, x, next_beta, next_alpha

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
        made, ctx.made = ctx.made, None
        if g is None:
            return (None,) * (_N_DEPTH + 1)
        o, beta, bias, seed = ctx.saved_tensors
        if made is not None and made[0] is g and made[1] == g._version:
            g_o, g_beta, *g_bias = made[2:]
        else:
            g_o, g_beta, *g_bias = _depth_backward(g, o, beta, bias, seed, ctx.dropout)
        return g_o, None, g_beta, None, g, *(g_bias or [None]), None, None, None


class _PreparedWidth(torch.autograd.Function):
    """The width connection's part: from h' to x, beta and the mixed residual."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, prepared: Prepared, *values: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, *values[:N_PARAMETERS], *values[N_OPERANDS : N_OPERANDS + 2])
        ctx.values = (values[N_PARAMETERS:N_OPERANDS], values[N_OPERANDS + 2 :])
        return prepared.x, prepared.beta, without_storage(h)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None) -> tuple[Any, ...]:
        h, *tensors = ctx.saved_tensors
        site, norm = ctx.values
        values = (*tensors[:N_PARAMETERS], *site, *tensors[N_PARAMETERS:], *norm)
        depth: Any = h.grad_fn
        follows_boundary = isinstance(depth, _BoundaryDepth._backward_cls)
        if follows_boundary:
            before = (*depth.saved_tensors, depth.dropout)
            g, g_o, g_before, *gradients = _boundary_backward(g_x, g_beta, g_mixed, h, *before, *values)
            g_bias = [] if before[2] is None else [gradients.pop()]
            depth.made = (g, g._version, g_o, g_before, *g_bias)
        else:
            g, *gradients = _width_backward(g_x, g_beta, g_mixed, h, *values)
        return g, None, *_placed(gradients, tensors, g_x is not None)


def _boundary_backward_impl(g_x: Any, g_beta: Any, g_mixed: Any, h: Tensor, *values: Any) -> list[Tensor]:
    o, beta, bias, seed, dropout = values[:5]
    p, norm = _site_of(values[5 : 5 + N_OPERANDS]), norm_of(values[5 + N_OPERANDS :])
    launch = _kernels()
    depth = launch.DepthInputs(o.contiguous(), None, beta.contiguous(), None, contiguous(bias), seed, dropout)
    incoming = map(contiguous, (g_x, g_beta, g_mixed))
    g, gradients, g_o, g_before = launch.boundary_backward(*incoming, h.contiguous(), depth, p, norm)
    return [g, g_o, g_before, *present(gradients)]


def _boundary_backward_fake(g_x: Any, g_beta: Any, g_mixed: Any, h: Tensor, *values: Any) -> list[Tensor]:
    o, beta, bias = values[:3]
    site = values[5:]
    norm = site[N_OPERANDS : N_OPERANDS + 2] if g_x is not None else ()
    streams = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, o, beta)]
    return [*streams, *(torch.empty_like(tensor) for tensor in present((*site[:N_PARAMETERS], *norm, bias)))]


def define(name: str, schema: str, implementation: Any, fake: Any, setup: Any = None, backward: Any = None) -> Any:
    op = torch.library.custom_op(f"megatron_fc::{name}", implementation, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup)
    return op


_INCOMING = "Tensor? g_x, Tensor? g_beta, Tensor? g_mixed"
_BEFORE = "Tensor o, Tensor beta, Tensor? bias, Tensor? seed, float dropout"
_width_backward = define(
    "frac_width_backward",
    f"({_INCOMING}, Tensor h, {_SITE}, {NORM}) -> Tensor[]",
    _width_backward_impl,
    _width_backward_fake,
)
_width = define(
    "frac_width",
    f"(Tensor h, {_SITE}, {NORM}, bool want_x) -> (Tensor, Tensor, Tensor, Tensor)",
    _width_impl,
    _width_fake,
    _width_context,
    _width_grad,
)
_depth_backward = define(
    "frac_depth_backward",
    f"(Tensor g, {_BEFORE}) -> Tensor[]",
    _depth_backward_impl,
    _depth_backward_fake,
)
_depth = define("frac_depth", f"({_DEPTH}) -> Tensor", _depth_impl, _depth_fake, _depth_context, _depth_grad)
_boundary_backward = define(
    "frac_boundary_backward",
    f"({_INCOMING}, Tensor h, {_BEFORE}, {_SITE}, {NORM}) -> Tensor[]",
    _boundary_backward_impl,
    _boundary_backward_fake,
)
_boundary = define(
    "frac_boundary",
    f"({_DEPTH}, {_SITE}, {NORM}) -> (Tensor, Tensor, Tensor, Tensor)",
    _boundary_impl,
    _boundary_fake,
)
