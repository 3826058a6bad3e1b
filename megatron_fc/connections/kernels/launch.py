"""Launches: functions on tensors, as in `megatron_fc.connections.eager`, plus the sub-layer's norm and the boundary.

Streams are [tokens, d] with d = m*c, rows contiguous. No function looks at a tensor's values or waits for the device.
"""

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fc.connections.kernels.depth import depth_backward_kernel, depth_forward_kernel
from megatron_fc.connections.kernels.tiles import Site
from megatron_fc.connections.kernels.width import width_backward_kernel, width_forward_kernel
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands, refuse_low_precision
from megatron_fc.connections.per_slot import PerSlotParameters

INTERPRETED = bool(triton.knobs.runtime.interpret)
_ROWS = 16  # of a tile: what a tensor core's product needs
_WARPS = 8
# Columns of a warp in a chunk. Chosen so that the compiler keeps everything in registers, twice as many in forward.
_COLUMNS, _COLUMNS_BACKWARD = 32, 16
# Programs for each of a GPU's processors. The registers of width and boundary backward leave room for one.
_PROGRAMS, _PROGRAMS_BACKWARD = 2, 1


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


class Partial(NamedTuple):
    """Sums of the programs for the gradients of parameters, fp32."""

    projection: Tensor | None  # [programs, 2m+1, c]
    table: Tensor  # [programs, R, KP], of the coefficients
    scaled: Tensor  # [programs, KP], of the scales, still a sum for each coefficient
    shift: Tensor  # [programs, KP], what the means of fractions take from the projection's
    weight: Tensor | None  # [programs, d], of the sub-layer's norm
    bias: Tensor | None


class WidthGradients(NamedTuple):
    """Gradients of a width connection: of the stream, of the site's parameters, of the sub-layer norm's."""

    h: Tensor
    parameters: PerSlotParameters
    weight: Tensor | None
    bias: Tensor | None


def width_forward(
    h: Tensor, p: Operands, norm: NormWeights | None = None, want_x: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """h [..., d] of T tokens -> x or norm(x) [..., d], beta [T, m] and alpha [T, m*m] in fp32."""
    return _width_forward(h, DepthInputs(), p, norm, want_x)


def boundary_forward(
    depth: DepthInputs, p: Operands, norm: NormWeights | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth connection of one site and width connection of the next: h' [..., d], then as `width_forward` of it."""
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
) -> WidthGradients:
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
) -> tuple[WidthGradients, Tensor, Tensor]:
    """As `width_backward` at h, the boundary's h'. Also gradients of o and beta."""
    depth, g_o, g_depth = _with_gradients(depth)
    return _width_backward(g_x, g_beta, g_mixed, h, depth, p, norm), g_o, g_depth


def depth_forward(depth: DepthInputs) -> Tensor:
    """h'_j = beta_j o_j + sum_i alpha_ij h_i, [..., d] in the dtype of h."""
    assert depth.h is not None
    assert depth.beta is not None
    out = torch.empty_like(depth.h)
    _launch(depth_forward_kernel, site_of(out, depth.beta.shape[1]), _tokens(out), out.device, depth, out)
    return out


def depth_backward(g: Tensor, depth: DepthInputs) -> tuple[Tensor, Tensor]:
    """Gradients of o (in its dtype) and of beta [T, m] in fp32; that of the mixed residual is g itself."""
    depth, g_o, g_beta = _with_gradients(depth)
    _launch(depth_backward_kernel, site_of(g, g_beta.shape[1]), _tokens(g), g.device, g, depth)
    return g_o, g_beta


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
    tokens, m = _tokens(h), p.fractions
    x = torch.empty_like(h) if want_x else None
    beta = h.new_empty(tokens, m, dtype=torch.float32)
    alpha = h.new_empty(tokens, m * m, dtype=torch.float32)
    site = site_of(h, m, p, norm if want_x else None)
    _launch(width_forward_kernel, site, tokens, h.device, h, depth, p.parameters, _weights(norm), x, beta, alpha)
    return x, beta, alpha


def _width_backward(
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    depth: DepthInputs,
    p: Operands,
    norm: NormWeights | None,
) -> WidthGradients:
    norm = norm if g_x is not None else None
    site, g_h = site_of(h, p.fractions, p, norm, backward=True), torch.empty_like(h)
    partial = _partial(programs(_tokens(h) * p.fractions, h.device, _PROGRAMS_BACKWARD), h, site, norm)
    arguments = (g_x, g_beta, g_mixed, h, depth, p.parameters, _weights(norm), g_h, partial)
    _launch(width_backward_kernel, site, _tokens(h), h.device, *arguments, per_processor=_PROGRAMS_BACKWARD)
    parameters = _parameter_gradients(partial, p)
    weight, bias = (None if part is None else part.sum(0) for part in (partial.weight, partial.bias))
    return WidthGradients(g_h, parameters, weight, bias)


def _partial(count: int, h: Tensor, site: Site, norm: NormWeights | None) -> Partial:
    # `count` programs. Without tokens none runs, and the sums over none of them are zero.
    def of(*shape: int) -> Tensor:
        return h.new_empty(count, *shape, dtype=torch.float32)

    return Partial(
        projection=of(2 * site.M + 1, site.C) if site.DYNAMIC else None,
        table=of(site.R, site.KP),
        scaled=of(site.KP),
        shift=of(site.KP),
        weight=of(h.shape[-1]) if norm is not None else None,
        bias=of(h.shape[-1]) if norm is not None and norm.bias is not None else None,
    )


def _parameter_gradients(partial: Partial, p: Operands) -> PerSlotParameters:
    m = p.fractions
    table = partial.table.unflatten(1, (-1, m)).sum((0, 1))  # rows are fractions, token after token
    gradients = PerSlotParameters(table[:, 0], table[:, 1 : 1 + m].flatten(), table[:, 1 + m : 1 + 2 * m].flatten())
    if partial.projection is None:
        return gradients
    k = 2 * m + 1
    projection = partial.projection.sum(0)
    if p.norm == "layernorm":
        projection = projection - partial.shift.sum(0)[:k, None]
    assert p.dynamic_weight is not None
    scaled = partial.scaled.sum(0)
    return gradients._replace(
        dynamic_weight=projection if p.norm_weight is None else projection * p.norm_weight,
        scale_beta=None if p.scale_beta is None else scaled[:1],
        scale_alpha=None if p.scale_alpha is None else scaled[1:k].sum(0, keepdim=True),
        norm_weight=None if p.norm_weight is None else (projection * p.dynamic_weight).sum(0),
    )


class Weights(NamedTuple):
    """Weight and bias [d] of the sub-layer's norm as the kernels take them."""

    weight: Tensor | None
    bias: Tensor | None


def _weights(norm: NormWeights | None) -> Weights:
    return Weights(None, None) if norm is None else Weights(norm.weight, norm.bias)


def site_of(
    h: Tensor, rate: int, p: Operands | None = None, norm: NormWeights | None = None, backward: bool = False
) -> Site:
    """What the kernels are compiled for, from a stream and the options; a depth connection has none."""
    c = h.shape[-1] // rate
    covered = max(16, triton.next_power_of_2(c))
    warps = min(_WARPS, covered // 16)
    columns = min(_COLUMNS_BACKWARD if backward else _COLUMNS, covered // warps)
    dynamic = p is not None and p.dynamic_weight is not None
    return Site(
        M=rate,
        C=c,
        R=_ROWS,
        W=warps,
        K=columns,
        # Lanes move 16 bytes each.
        L=min(_ROWS, 32 * 16 // (2 * columns)),
        CHUNKS=-(-c // (warps * columns)),
        KP=max(16, triton.next_power_of_2(2 * rate + 1)),
        DYNAMIC=dynamic,
        NORM=p.norm if p is not None and dynamic else "none",
        EPS=p.norm_eps if p is not None else 1.0,
        TANH=p is not None and p.tanh,
        SUB_NORM=norm.kind if norm is not None else "none",
        SUB_EPS=norm.eps if norm is not None else 1.0,
        ONE_PLUS=norm.one_plus if norm is not None else False,
        # The interpreter's products are wrong in bf16.
        EXACT=h.dtype == torch.float32 or (INTERPRETED and h.dtype == torch.bfloat16),
    )


def _tokens(stream: Tensor) -> int:
    return stream.numel() // stream.shape[-1]


def _launch(
    kernel: Any, site: Site, tokens: int, device: torch.device, *arguments: Any, per_processor: int = _PROGRAMS
) -> None:
    if not tokens:
        return
    # Loops are unrolled over what the compiler knows to be constant; the interpreter wants plain values.
    constants = site if INTERPRETED else Site(*map(tl.constexpr, site))
    count = tokens * site.M
    grid = (programs(count, device, per_processor),)
    # Triton launches on the current device, whichever has the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, count, S=constants, num_warps=site.W, num_stages=1)


def programs(count: int, device: torch.device, per_processor: int) -> int:
    """Programs for so many rows: they go on to the next tile until none is left."""
    return min(-(-count // _ROWS), per_processor * _processors(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
