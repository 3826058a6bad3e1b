"""The operations of a Frac-Connection as torch.library custom ops: what torch.compile and autograd see of a backend.

The mixed residual A(h)^T h is never in memory. It has a name nevertheless: `mixed`, an output of the width connection
and an input of the depth connection, of the stream's shape and without storage of its own. Its value is made anew where
it is needed; its gradient, that of the next residual stream, is real and is what the width connection's backward pass
takes. So one pass writes the whole gradient of h, and autograd has nothing to add up.

For backward are kept: h (width), o and beta (depth); the coefficients gamma and alpha are computed again.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fc import eager
from megatron_fc.config import FracConfig
from megatron_fc.functional import FracParameters
from megatron_fc.norm import NormWeights

_SITE = (
    "Tensor static_beta, Tensor static_gamma, Tensor static_alpha, Tensor? dynamic_weight, Tensor? scale_beta, "
    "Tensor? scale_alpha, Tensor? norm_weight, int rate, str norm, bool tanh, float norm_eps"
)
_NORM = "Tensor? sub_weight, Tensor? sub_bias, str sub_norm, float sub_eps, bool one_plus"
_DEPTH = "Tensor o, Tensor h, Tensor beta, Tensor alpha, Tensor mixed, Tensor? bias, Tensor? seed, float dropout"
_N_SITE, _N_NORM, _N_DEPTH = 11, 5, 8

# By operator, for those who look at what it does inside; the backend is the last argument of those that have a choice.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


class Handover(NamedTuple):
    """What a width connection leaves for the depth connection of the same site.

    Attributes:
        beta: [..., m] in fp32.
        alpha: [..., m*m] in fp32, without gradient: that comes through `mixed`.
        mixed: [..., d] without storage, the mixed residual.
    """

    beta: Tensor
    alpha: Tensor
    mixed: Tensor


def frac_width(
    h: Tensor, p: FracParameters, config: FracConfig, norm: NormWeights | None, backend: str, want_x: bool = True
) -> tuple[Tensor, Handover]:
    """Width connection: x or norm(x) [..., d] (empty without want_x), and what the depth connection takes over."""
    x, *handover = _width(h, *_site_words(p, config), *_norm_words(norm), want_x, backend)
    return x, Handover(*handover)


def frac_depth(
    o: Tensor,
    h: Tensor,
    handover: Handover,
    backend: str,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Depth connection: the next residual stream [..., d] in the dtype of h. Bias and dropout: Triton only."""
    return _depth(o, h.detach(), *handover, bias, seed, dropout, backend)


def frac_boundary(
    o: Tensor,
    h: Tensor,
    handover: Handover,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    p: FracParameters,
    config: FracConfig,
    norm: NormWeights | None,
) -> tuple[Tensor, Tensor, Handover]:
    """Depth connection of one site and width connection of the next in one pass: h', x and the next handover."""
    words = (*_site_words(p, config), *_norm_words(norm))
    h, x, *following = _boundary(o, h.detach(), *handover, bias, seed, dropout, *words)
    return h, x, Handover(*following)


def _site_words(p: FracParameters, config: FracConfig) -> tuple[Any, ...]:
    return (*p, config.rate, config.norm, config.tanh, config.norm_eps)


def _norm_words(norm: NormWeights | None) -> tuple[Any, ...]:
    return (
        (None, None, "none", 1.0, False)
        if norm is None
        else (norm.weight, norm.bias, norm.kind, norm.eps, norm.one_plus)
    )


def _site(words: tuple[Any, ...]) -> tuple[FracParameters, FracConfig]:
    """The reverse of `_site_words`."""
    p = FracParameters(*words[:7])
    rate, norm, tanh, eps = words[7:]
    if p.dynamic_weight is None:
        return p, FracConfig(rate=rate, dynamic=False)
    return p, FracConfig(rate=rate, norm=norm, tanh=tanh, scale=p.scale_beta is not None, norm_eps=eps)


def _norm(words: tuple[Any, ...]) -> NormWeights | None:
    weight, bias, kind, eps, one_plus = words
    return None if kind == "none" else NormWeights(kind, weight, bias, eps, one_plus)


def _kernels() -> ModuleType:
    from megatron_fc.kernels import launch

    return launch


def _rows(stream: Tensor) -> Tensor:
    """[..., d] -> [tokens, d] with contiguous rows."""
    return stream.reshape(-1, stream.shape[-1]).contiguous()


def _optional_rows(stream: Tensor | None) -> Tensor | None:
    return None if stream is None else _rows(stream)


def _coefficients_like(h: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = h.shape[:-1], torch.promote_types(h.dtype, torch.float32)
    return h.new_empty(*lead, rate, dtype=dtype), h.new_empty(*lead, rate * rate, dtype=dtype), _without_storage(h)


def _without_storage(like: Tensor) -> Tensor:
    return like.new_zeros(1).expand(like.shape)


def _apart(gradients: FracParameters) -> list[Tensor]:
    """Gradients of a site in storages of their own: an op may not return slices of one table, as small ones may be."""
    return [g.clone() if g.dim() == 1 else g for g in _present(gradients)]


def _present(tensors: Any) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


# Width connection.


def _width_impl(h: Tensor, *words: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *words_of_site, want_x, backend = words
    (p, config), norm = _site(tuple(words_of_site[:_N_SITE])), _norm(tuple(words_of_site[_N_SITE:]))
    if backend == "triton":
        x, beta, alpha = _kernels().width_forward(_rows(h), p, config, norm, want_x)
    else:
        x, beta, alpha = eager.width_forward(_rows(h), p, config, want_x)
    x = h.new_empty(0) if x is None else x.view(h.shape)
    lead = h.shape[:-1]
    return (
        x,
        beta.view(*lead, config.rate),
        alpha.view(*lead, config.rate**2),
        _without_storage(h),
    )


def _width_fake(h: Tensor, *words: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.empty_like(h, memory_format=torch.contiguous_format) if words[-2] else h.new_empty(0)
    return x, *_coefficients_like(h, words[7])


def _width_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, *words = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    tensors = (h, *words[:7], *words[_N_SITE : _N_SITE + 2])
    ctx.save_for_backward(*tensors)
    ctx.words = (words[7:_N_SITE], words[_N_SITE + 2 : _N_SITE + _N_NORM], words[-1])


def _width_grad(ctx: Any, g_x: Tensor | None, g_beta: Tensor | None, _: Any, g_mixed: Tensor | None) -> tuple[Any, ...]:
    h, *tensors = ctx.saved_tensors
    site, norm, backend = ctx.words
    words = (*tensors[:7], *site, *tensors[7:], *norm)
    if g_x is not None and not g_x.numel():
        g_x = None
    g_h, *gradients = _width_backward(g_x, g_beta, g_mixed, h, *words, backend)
    return (g_h, *_placed(gradients, tensors, g_x is not None), None, None)


def _placed(gradients: list[Tensor], tensors: list[Any], normed: bool) -> tuple[Any, ...]:
    """Gradients at the places of the tensors that they belong to, None at the places of other words."""
    rest = iter(gradients)
    site = [None if tensor is None else next(rest) for tensor in tensors[:7]]
    norm = [None if tensor is None or not normed else next(rest) for tensor in tensors[7:]]
    return (*site, *[None] * (_N_SITE - 7), *norm, *[None] * (_N_NORM - 2))


def _width_backward_impl(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, *words: Any
) -> list[Tensor]:
    *words_of_site, backend = words
    (p, config), norm = _site(tuple(words_of_site[:_N_SITE])), _norm(tuple(words_of_site[_N_SITE:]))
    incoming = (_optional_rows(g_x), _optional_rows(g_beta), _optional_rows(g_mixed))
    if backend == "triton":
        g = _kernels().width_backward(*incoming, _rows(h), p, config, norm)
        weights = _norm_gradients(norm if g_x is not None else None, g.weight, g.bias)
        return [g.h.view(h.shape), *_apart(g.parameters), *weights]
    g_h, parameters = eager.width_backward(*incoming, _rows(h), p, config)
    return [g_h.view(h.shape), *_apart(parameters)]


def _norm_gradients(norm: NormWeights | None, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """In the dtypes of the norm's parameters."""
    if norm is None or weight is None:
        return []
    given = [weight.to(norm.weight.dtype)]
    if norm.bias is not None and bias is not None:
        given.append(bias.to(norm.bias.dtype))
    return given


def _width_backward_fake(
    g_x: Tensor | None, g_beta: Tensor | None, g_mixed: Tensor | None, h: Tensor, *words: Any
) -> list[Tensor]:
    norm = words[_N_SITE : _N_SITE + 2] if g_x is not None else ()
    stream = torch.empty_like(h, memory_format=torch.contiguous_format)
    return [stream, *(torch.empty_like(tensor) for tensor in _present((*words[:7], *norm)))]


# Depth connection.


def _depth_impl(o: Tensor, h: Tensor, beta: Tensor, alpha: Tensor, mixed: Tensor, *words: Any) -> Tensor:
    bias, seed, dropout, backend = words
    rows = (_rows(o), _rows(h), _rows(beta), _rows(alpha))
    if backend == "triton":
        launch = _kernels()
        before = launch.Before(*rows, bias, seed, dropout)
        return launch.depth_forward(before, FracConfig(rate=beta.shape[-1], dynamic=False)).view(h.shape)
    return eager.depth_forward(*rows).view(h.shape)


def _depth_fake(o: Tensor, h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _depth_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    o, _, beta, _, _, bias, seed, ctx.dropout, ctx.backend = inputs
    ctx.save_for_backward(o, beta, bias, seed)


def _depth_grad(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    o, beta, bias, seed = ctx.saved_tensors
    g_o, g_beta = _depth_backward(g, o, beta, bias, seed, ctx.dropout, ctx.backend)
    return g_o, None, g_beta, None, g, _bias_gradient(g_o, bias), None, None, None


def _bias_gradient(g_o: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _rows(g_o).sum(0, dtype=torch.float32).to(bias.dtype)


def _depth_backward_impl(g: Tensor, o: Tensor, beta: Tensor, *words: Any) -> tuple[Tensor, Tensor]:
    bias, seed, dropout, backend = words
    if backend == "triton":
        launch = _kernels()
        before = launch.Before(_rows(o), None, _rows(beta), None, bias, seed, dropout)
        g_o, g_beta = launch.depth_backward(_rows(g), before, FracConfig(rate=beta.shape[-1], dynamic=False))
    else:
        g_o, g_beta = eager.depth_backward(_rows(g), _rows(o), _rows(beta))
    return g_o.view(o.shape), g_beta.view(beta.shape)


def _depth_backward_fake(g: Tensor, o: Tensor, beta: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (o, beta))  # type: ignore[return-value]


# Boundary: Triton only; elsewhere the two operations one after the other are as fast.


def _boundary_impl(*words: Any) -> tuple[Tensor, ...]:
    o, h, beta, alpha, _, bias, seed, dropout = words[:_N_DEPTH]
    p, config = _site(words[_N_DEPTH : _N_DEPTH + _N_SITE])
    launch = _kernels()
    before = launch.Before(_rows(o), _rows(h), _rows(beta), _rows(alpha), bias, seed, dropout)
    out = launch.boundary_forward(before, p, config, _norm(words[_N_DEPTH + _N_SITE :]))
    following = (tensor.view(like.shape) for tensor, like in zip(out, (h, h, beta, alpha), strict=True))
    return (*following, _without_storage(h))


def _boundary_fake(*words: Any) -> tuple[Tensor, ...]:
    stream = torch.empty_like(words[1], memory_format=torch.contiguous_format)
    return stream, torch.empty_like(stream), *_coefficients_like(stream, words[_N_DEPTH + 7])


def _boundary_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    o, _, beta, _, _, bias, seed, ctx.dropout = inputs[:_N_DEPTH]
    words = inputs[_N_DEPTH:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(output[0], o, beta, bias, seed, *words[:7], *words[_N_SITE : _N_SITE + 2])
    ctx.words = (words[7:_N_SITE], words[_N_SITE + 2 :])


def _boundary_grad(ctx: Any, g_h: Any, g_x: Any, g_beta: Any, _: Any, g_mixed: Any) -> tuple[Any, ...]:
    h, o, beta, bias, seed, *tensors = ctx.saved_tensors
    site, norm = ctx.words
    words = (*tensors[:7], *site, *tensors[7:], *norm)
    g, g_o, g_before, *gradients = _boundary_backward(
        g_h, g_x, g_beta, g_mixed, h, o, beta, bias, seed, ctx.dropout, *words
    )
    # The whole gradient of h' is that of the mixed residual before it.
    before = (g_o, None, g_before, None, g, _bias_gradient(g_o, bias), None, None)
    return (*before, *_placed(gradients, tensors, g_x is not None))


def _boundary_backward_impl(g_h: Any, g_x: Any, g_beta: Any, g_mixed: Any, h: Tensor, *words: Any) -> list[Tensor]:
    o, beta, bias, seed, dropout = words[:5]
    (p, config), norm = _site(words[5 : 5 + _N_SITE]), _norm(words[5 + _N_SITE :])
    launch = _kernels()
    before = launch.Before(_rows(o), None, _rows(beta), None, bias, seed, dropout)
    incoming = [_optional_rows(g) for g in (g_h, g_x, g_beta, g_mixed)]
    g, g_o, g_before = launch.boundary_backward(*incoming, _rows(h), before, p, config, norm)
    weights = _norm_gradients(norm if g_x is not None else None, g.weight, g.bias)
    return [g.h.view(h.shape), g_o.view(o.shape), g_before.view(beta.shape), *_apart(g.parameters), *weights]


def _boundary_backward_fake(g_h: Any, g_x: Any, g_beta: Any, g_mixed: Any, h: Tensor, *words: Any) -> list[Tensor]:
    o, beta = words[:2]
    site = words[5:]
    norm = site[_N_SITE : _N_SITE + 2] if g_x is not None else ()
    streams = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, o, beta)]
    return [*streams, *(torch.empty_like(tensor) for tensor in _present((*site[:7], *norm)))]


def _define(name: str, schema: str, implementation: Any, fake: Any, setup: Any = None, backward: Any = None) -> Any:
    def run(*words: Any) -> Any:
        # What overrides torch functions has seen the operation itself; asked again for each of its dozens of calls, the
        # CPU lane's mode costs as much as a tenth of them.
        with torch._C.DisableTorchFunction():
            return implementation(*words)

    op = torch.library.custom_op(f"megatron_fc::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    IMPLEMENTATIONS[op._opoverload] = implementation
    if backward is not None:
        op.register_autograd(backward, setup_context=setup)
    return op


_INCOMING = "Tensor? g_x, Tensor? g_beta, Tensor? g_mixed"
_BEFORE = "Tensor o, Tensor beta, Tensor? bias, Tensor? seed, float dropout"
_width_backward = _define(
    "frac_width_backward",
    f"({_INCOMING}, Tensor h, {_SITE}, {_NORM}, str backend) -> Tensor[]",
    _width_backward_impl,
    _width_backward_fake,
)
_width = _define(
    "frac_width",
    f"(Tensor h, {_SITE}, {_NORM}, bool want_x, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _width_impl,
    _width_fake,
    _width_context,
    _width_grad,
)
_depth_backward = _define(
    "frac_depth_backward",
    f"(Tensor g, {_BEFORE}, str backend) -> (Tensor, Tensor)",
    _depth_backward_impl,
    _depth_backward_fake,
)
_depth = _define(
    "frac_depth", f"({_DEPTH}, str backend) -> Tensor", _depth_impl, _depth_fake, _depth_context, _depth_grad
)
_boundary_backward = _define(
    "frac_boundary_backward",
    f"(Tensor? g_h, {_INCOMING}, Tensor h, {_BEFORE}, {_SITE}, {_NORM}) -> Tensor[]",
    _boundary_backward_impl,
    _boundary_backward_fake,
)
_boundary = _define(
    "frac_boundary",
    f"({_DEPTH}, {_SITE}, {_NORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _boundary_impl,
    _boundary_fake,
    _boundary_context,
    _boundary_grad,
)
