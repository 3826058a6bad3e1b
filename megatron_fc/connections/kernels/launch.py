"""Launches: functions on tensors, as in `megatron_fc.connections.eager`, plus the sub-layer's norm and the boundary.

Streams are [tokens, n*c] for n slots, a sub-layer's input and output [tokens, d] with d = m*c for m fractions; rows are
contiguous. No function looks at a tensor's values or waits for the device.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from megatron_fc.connections.kernels.cuts import (
    DEPTH,
    INTERPRETED,
    WIDTH,
    WIDTH_BACKWARD,
    Cut,
    cut_for,
    options,
    programs,
    site_of,
)
from megatron_fc.connections.kernels.depth import depth_backward_kernel, depth_forward_kernel
from megatron_fc.connections.kernels.gluon.choice import main_backward, main_depth, main_forward, main_given
from megatron_fc.connections.kernels.gluon.cuts import Main
from megatron_fc.connections.kernels.sums import Gradients, Partial, reduce_kernel
from megatron_fc.connections.kernels.tables import Given
from megatron_fc.connections.kernels.tiles import Site
from megatron_fc.connections.kernels.width import width_backward_kernel, width_forward_kernel
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands, refuse_double, refuse_low_precision
from megatron_fc.connections.per_slot import PerSlotParameters

_NO_PARAMETERS: Any = PerSlotParameters(*[None] * 7)  # type: ignore[arg-type]


# Of the launch that adds up what programs have summed: columns of the projection and of vectors [d], programs at once.
_REDUCED_COLUMNS, _REDUCED_WIDE, _REDUCED_PROGRAMS, _REDUCED_WARPS = 8, 32, 128, 8


class DepthInputs(NamedTuple):
    """What a depth connection reads, and in backward where its gradients go. All None: there is no depth connection."""

    o: Tensor | None = None
    h: Tensor | None = None
    beta: Tensor | None = None
    alpha: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None
    dropout: float = 0.0
    g_o: Tensor | None = None
    g_beta: Tensor | None = None


def width_forward(
    h: Tensor, p: Operands, norm: NormWeights | None = None, want_x: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """h [..., n*c] of T tokens -> x or norm(x) [..., d], beta [T, n] and alpha [T, n*n] in fp32."""
    return _width_forward(h, DepthInputs(), p, norm, want_x)


def boundary_forward(
    depth: DepthInputs, p: Operands, norm: NormWeights | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth connection of one site and width connection of the next: h' [..., n*c], then as `width_forward` of it."""
    assert depth.h is not None
    h = torch.empty_like(depth.h)
    x, beta, alpha = _width_forward(h, depth, p, norm, True)
    assert x is not None
    return h, x, beta, alpha


def width_backward(
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    p: Operands,
    norm: NormWeights | None = None,
) -> tuple[Tensor, Gradients]:
    """Gradients of h and of all parameters; the incoming ones may be None, which stands for zero."""
    return _width_backward(g_x, g_beta, g_mixed, h, DepthInputs(), p, norm)


def boundary_backward(
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    depth: DepthInputs,
    p: Operands,
    norm: NormWeights | None = None,
) -> tuple[Tensor, Gradients, Tensor, Tensor]:
    """As `width_backward` at h, the boundary's h', and with the parameters o's bias. Also gradients of o and beta."""
    depth, g_o, g_depth = _with_gradients(depth)
    return *_width_backward(g_x, g_beta, g_mixed, h, depth, p, norm), g_o, g_depth


def given_width_forward(h: Tensor, gamma: Tensor, fractions: int, norm: NormWeights | None = None) -> Tensor:
    """x or norm(x) [..., d] of h [..., n*c], with gamma [T, n*m] in fp32."""
    slots = gamma.shape[1] // fractions
    c = h.shape[-1] // slots
    x, cut = h.new_empty(*h.shape[:-1], c * fractions), cut_for(WIDTH, c)
    kernel, site = width_forward_kernel, site_of(cut, h, slots, fractions, norm=norm)
    if (main := main_given("forward", site, (h, x), (gamma,), norm)) is not None:
        kernel, site, cut = main.kernel, main.site, cut_of(main)
    arguments = (h, DepthInputs(), Given(gamma), _NO_PARAMETERS, _weights(norm), x, None, None)
    _launch(kernel, site, cut, h, *arguments)
    return x


def given_width_backward(
    g_x: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    gamma: Tensor,
    alpha: Tensor,
    fractions: int,
    norm: NormWeights | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Gradients]:
    """Gradients of h by way of x and of the mixed residual alone; of gamma [T, n*m] and alpha [T, n*n]; of the norm's.

    Those of gamma and the norm are None where g_x is, that of alpha where g_mixed is.
    """
    norm, slots = norm if g_x is not None else None, gamma.shape[1] // fractions
    cut = cut_for(WIDTH_BACKWARD, h.shape[-1] // slots)
    kernel, site = width_backward_kernel, site_of(cut, h, slots, fractions, norm=norm)
    if (main := main_given("backward", site, (h, g_x, g_mixed), (gamma, alpha), norm)) is not None:
        kernel, site, cut = main.kernel, main.site, cut_of(main)
    g_gamma = None if g_x is None else torch.empty_like(gamma)
    g_alpha = None if g_mixed is None else torch.empty_like(alpha)
    given = Given(gamma, alpha, g_gamma, g_alpha)
    g_h, gradients = _gradients(kernel, g_x, None, g_mixed, h, DepthInputs(), given, _NO_PARAMETERS, norm, site, cut)
    return g_h, g_gamma, g_alpha, gradients


def depth_forward(depth: DepthInputs) -> Tensor:
    """h'_j = beta_j o_((j-1) mod m + 1) + sum_i alpha_ij h_i, [..., n*c] in the dtype of h."""
    assert depth.h is not None
    assert depth.beta is not None
    out = torch.empty_like(depth.h)
    kernel, site, cut = depth_forward_kernel, _depth_site(out, depth), DEPTH
    if (main := main_depth(site, out, depth)) is not None:
        kernel, site, cut = main.kernel, main.site, cut_of(main)
    _launch(kernel, site, cut, out, depth, out)
    return out


def depth_backward(g: Tensor, depth: DepthInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of o (in its dtype), of beta [T, n] in fp32 and of o's bias; that of the mixed residual is g itself."""
    depth, g_o, g_beta = _with_gradients(depth)
    site = _depth_site(g, depth)
    partial = _partial(programs(_tokens(g) * site.N, g.device, DEPTH), g, site, output_bias=depth.bias)
    _launch(depth_backward_kernel, site, DEPTH, g, g, depth, partial)
    return g_o, g_beta, _reduced(partial, site, Gradients(output_bias=_like(depth.bias))).output_bias


def _depth_site(stream: Tensor, depth: DepthInputs) -> Site:
    assert depth.o is not None
    assert depth.beta is not None
    slots = depth.beta.shape[1]
    return site_of(DEPTH, stream, slots, depth.o.shape[-1] * slots // stream.shape[-1])


def _with_gradients(depth: DepthInputs) -> tuple[DepthInputs, Tensor, Tensor]:
    """Room for the gradients of o and beta; h and alpha, which they do not depend on, are left out."""
    assert depth.o is not None
    assert depth.beta is not None
    g_o, g_beta = torch.empty_like(depth.o), torch.empty_like(depth.beta)
    return depth._replace(g_o=g_o, g_beta=g_beta, h=None, alpha=None), g_o, g_beta


def _width_forward(
    h: Tensor, depth: DepthInputs, p: Operands, norm: NormWeights | None, want_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    refuse_low_precision(p)
    refuse_double(p)
    tokens, n = _tokens(h), p.slots
    x = h.new_empty(*h.shape[:-1], h.shape[-1] // n * p.fractions) if want_x else None
    beta = h.new_empty(tokens, n, dtype=torch.float32)
    alpha = h.new_empty(tokens, n * n, dtype=torch.float32)
    kernel, cut = width_forward_kernel, cut_for(WIDTH, h.shape[-1] // n)
    site = site_of(cut, h, n, p.fractions, p, norm if want_x else None)
    if (main := main_forward(site, h, x, depth, p, norm)) is not None:
        kernel, site, cut = main.kernel, main.site, cut_of(main)
    _launch(kernel, site, cut, h, h, depth, Given(), p.parameters, _weights(norm), x, beta, alpha)
    return x, beta, alpha


def _width_backward(
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    depth: DepthInputs,
    p: Operands,
    norm: NormWeights | None,
) -> tuple[Tensor, Gradients]:
    norm = norm if g_x is not None else None
    cut = cut_for(WIDTH_BACKWARD, h.shape[-1] // p.slots)
    kernel, site = width_backward_kernel, site_of(cut, h, p.slots, p.fractions, p, norm)
    if (main := main_backward(site, h, (g_x, g_mixed, g_beta), depth, p, norm)) is not None:
        kernel, site, cut = main.kernel, main.site, cut_of(main)
    return _gradients(kernel, g_x, g_beta, g_mixed, h, depth, Given(), p.parameters, norm, site, cut)


def _gradients(
    kernel: Any,
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    depth: DepthInputs,
    given: Given,
    parameters: PerSlotParameters,
    norm: NormWeights | None,
    site: Site,
    cut: Cut,
) -> tuple[Tensor, Gradients]:
    """Of h and of the parameters."""
    g_h, weights = torch.empty_like(h), _weights(norm)
    count = programs(_tokens(h) * site.N, h.device, cut)
    partial = _partial(count, h, site, weights, depth.bias, tables=given.gamma is None)
    arguments = (g_x, g_beta, g_mixed, h, depth, given, parameters, weights, g_h, partial)
    _launch(kernel, site, cut, h, *arguments)
    wanted = Gradients(*map(_like, (*parameters, *weights, depth.bias)))
    return g_h, _reduced(partial, site, wanted, parameters)


def _like(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _partial(
    count: int,
    h: Tensor,
    site: Site,
    weights: "Weights | None" = None,
    output_bias: Tensor | None = None,
    tables: bool = True,
) -> Partial:
    """Of `count` programs; of a depth connection without `weights`, where coefficients are given without `tables`."""

    def of(*shape: int, wanted: bool = True) -> Tensor | None:
        return h.new_empty(count, *shape, dtype=torch.float32) if wanted else None

    d, output = site.M * site.C, of(site.M * site.C, wanted=output_bias is not None)
    if weights is None:
        return Partial(output_bias=output)
    return Partial(
        projection=of(site.TO - site.FROM, site.C, wanted=site.TO > 0),
        table=of(site.N, site.KP, wanted=tables),
        scaled=of(site.KP, wanted=site.TO > 0),
        shift=of(site.KP, wanted=site.NORM == "layernorm"),
        weight=of(d, wanted=weights.weight is not None),
        bias=of(d, wanted=weights.bias is not None),
        output_bias=output,
    )


def _reduced(
    partial: Partial, site: Site, wanted: Gradients, parameters: PerSlotParameters = _NO_PARAMETERS
) -> Gradients:
    """All gradients of parameters, in one launch; without any, in none."""
    some = next((sums for sums in partial if sums is not None), None)
    if some is None:
        return wanted
    blocks = -(-site.C // _REDUCED_COLUMNS) if site.TO else 0
    vectors = -(-site.M * site.C // _REDUCED_WIDE)
    arguments = (partial, parameters, wanted, len(some))
    constants = (_constant(site), blocks, _REDUCED_COLUMNS, _REDUCED_WIDE, _REDUCED_PROGRAMS)
    with on_device(some.device):
        reduce_kernel[blocks + vectors + 1,](*arguments, *constants, num_warps=_REDUCED_WARPS)
    return wanted


class Weights(NamedTuple):
    """Weight and bias [d] of the sub-layer's norm as the kernels take them."""

    weight: Tensor | None
    bias: Tensor | None


def _weights(norm: NormWeights | None) -> Weights:
    return Weights(None, None) if norm is None else Weights(norm.weight, norm.bias)


def cut_of(main: Main) -> Cut:
    """The cut of a main kernel."""
    return Cut(main.site.W, main.site.K, main.programs)


def _tokens(stream: Tensor) -> int:
    return stream.numel() // stream.shape[-1]


def _launch(kernel: Any, site: Site, cut: Cut, stream: Tensor, *arguments: Any) -> None:
    count = _tokens(stream) * site.N
    if not count:
        return
    grid = (programs(count, stream.device, cut),)
    with on_device(stream.device):
        kernel[grid](*arguments, count, S=_constant(site), **options(site, cut))


def _constant(site: Site) -> Site:
    """Loops are unrolled over what the compiler knows to be constant; the interpreter wants plain values."""
    return site if INTERPRETED else Site(*map(tl.constexpr, site))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever has the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
