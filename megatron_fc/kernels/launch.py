"""Launches: functions on tensors, as in `megatron_fc.eager`, plus the sub-layer's norm and the boundary.

Streams are [tokens, d] with d = m*c, rows contiguous. No function looks at a tensor's values or waits for the device.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fc.config import FracConfig
from megatron_fc.functional import FracParameters
from megatron_fc.kernels.depth import depth_backward_kernel, depth_forward_kernel
from megatron_fc.kernels.tiles import Site
from megatron_fc.kernels.width import width_backward_kernel, width_forward_kernel
from megatron_fc.norm import NormWeights

INTERPRETED = bool(triton.knobs.runtime.interpret)
_ROWS = 16  # of a tile: what a tensor core's product needs
_PROGRAMS_PER_SM = 2


class Before(NamedTuple):
    """A depth connection: its inputs, and in backward where its gradients go. Nothing at all: there is none."""

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
    tables: Tensor  # [programs, 3, R, KP]
    weight: Tensor | None  # [programs, d], of the sub-layer's norm
    bias: Tensor | None


class WidthGradients(NamedTuple):
    """Gradients of a width connection: of the stream, of the site's parameters, of the sub-layer norm's."""

    h: Tensor
    parameters: FracParameters
    weight: Tensor | None
    bias: Tensor | None


def width_forward(
    h: Tensor, p: FracParameters, config: FracConfig, norm: NormWeights | None = None, want_x: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """h [T, d] -> x or norm(x) [T, d], beta [T, m] and alpha [T, m*m] in fp32."""
    return _width_forward(h, Before(), p, config, norm, want_x)


def boundary_forward(
    before: Before, p: FracParameters, config: FracConfig, norm: NormWeights | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth connection of one site and width connection of the next: h' [T, d], then as `width_forward` of it."""
    assert before.h is not None
    h = torch.empty_like(before.h)
    x, beta, alpha = _width_forward(h, before, p, config, norm, True)
    assert x is not None
    return h, x, beta, alpha


def width_backward(
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    p: FracParameters,
    config: FracConfig,
    norm: NormWeights | None = None,
) -> WidthGradients:
    """Gradients of h and of all parameters; the incoming ones may be None, which stands for zero."""
    return _width_backward(g_x, g_beta, g_mixed, None, h, Before(), p, config, norm)


def boundary_backward(
    g_h: Tensor | None,
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    h: Tensor,
    before: Before,
    p: FracParameters,
    config: FracConfig,
    norm: NormWeights | None = None,
) -> tuple[WidthGradients, Tensor, Tensor]:
    """As `width_backward` at h, the boundary's h'; g_h is what else its gradient has. Also gradients of o and beta."""
    before, g_o, g_before = _with_gradients(before)
    return _width_backward(g_x, g_beta, g_mixed, g_h, h, before, p, config, norm), g_o, g_before


def depth_forward(before: Before, config: FracConfig) -> Tensor:
    """h'_j = beta_j o_j + sum_i alpha_ij h_i, [T, d] in the dtype of h."""
    assert before.h is not None
    out = torch.empty_like(before.h)
    site, count = _site(out, config, None), out.shape[0] * config.rate
    if count:
        depth_forward_kernel[_grid(out, count)](before, out, count, S=site, num_warps=4, num_stages=2)
    return out


def depth_backward(g: Tensor, before: Before, config: FracConfig) -> tuple[Tensor, Tensor]:
    """Gradients of o (in its dtype) and of beta [T, m] in fp32; that of the mixed residual is g itself."""
    before, g_o, g_beta = _with_gradients(before)
    site, count = _site(g, config, None), g.shape[0] * config.rate
    if count:
        depth_backward_kernel[_grid(g, count)](g, before, count, S=site, num_warps=4, num_stages=2)
    return g_o, g_beta


def _with_gradients(before: Before) -> tuple[Before, Tensor, Tensor]:
    """Room for the gradients of o and beta; h and alpha, which they do not depend on, are left out."""
    assert before.o is not None
    assert before.beta is not None
    g_o, g_beta = torch.empty_like(before.o), torch.empty_like(before.beta)
    return before._replace(g_o=g_o, g_beta=g_beta, h=None, alpha=None), g_o, g_beta


def _width_forward(
    h: Tensor, before: Before, p: FracParameters, config: FracConfig, norm: NormWeights | None, want_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    tokens, m = h.shape[0], config.rate
    x = torch.empty_like(h) if want_x else None
    beta = h.new_empty(tokens, m, dtype=torch.float32)
    alpha = h.new_empty(tokens, m * m, dtype=torch.float32)
    site, count = _site(h, config, norm if want_x else None), tokens * m
    if count:
        width_forward_kernel[_grid(h, count)](
            h,
            before,
            p,
            _weights(norm),
            x,
            beta,
            alpha,
            count,
            S=site,
            num_warps=warps(h),
            num_stages=stages(site, backward=False),
        )
    return x, beta, alpha


def _width_backward(
    g_x: Tensor | None,
    g_beta: Tensor | None,
    g_mixed: Tensor | None,
    g_other: Tensor | None,
    h: Tensor,
    before: Before,
    p: FracParameters,
    config: FracConfig,
    norm: NormWeights | None,
) -> WidthGradients:
    norm = norm if g_x is not None else None
    site, count, g_h = _site(h, config, norm), h.shape[0] * config.rate, torch.empty_like(h)
    grid = _grid(h, count)
    partial = _partial(grid[0], h, site_of(h, config, norm), norm)
    if count:
        width_backward_kernel[grid](
            g_x,
            g_beta,
            g_mixed,
            g_other,
            h,
            before,
            p,
            _weights(norm),
            g_h,
            partial,
            count,
            S=site,
            num_warps=warps(h),
            num_stages=stages(site, backward=True),
        )
    parameters = _parameter_gradients(partial, p, config)
    weight, bias = (None if part is None else part.sum(0) for part in (partial.weight, partial.bias))
    return WidthGradients(g_h, parameters, weight, bias)


def _partial(programs: int, h: Tensor, site: Site, norm: NormWeights | None) -> Partial:
    # Without tokens no program runs, and the sums over none of them are zero.
    def of(*shape: int) -> Tensor:
        return h.new_empty(programs, *shape, dtype=torch.float32)

    return Partial(
        projection=of(2 * site.M + 1, site.C) if site.DYNAMIC else None,
        tables=of(3, site.R, site.KP),
        weight=of(h.shape[1]) if norm is not None else None,
        bias=of(h.shape[1]) if norm is not None and norm.bias is not None else None,
    )


def _parameter_gradients(partial: Partial, p: FracParameters, config: FracConfig) -> FracParameters:
    m = config.rate
    static, scaled, shift = partial.tables.sum(0).unbind(0)  # [R, KP] each: rows are fractions, token after token
    table = static.unflatten(0, (-1, m)).sum(0)
    gradients = FracParameters(table[:, 0], table[:, 1 : 1 + m].flatten(), table[:, 1 + m : 1 + 2 * m].flatten())
    if partial.projection is None:
        return gradients
    k = 2 * m + 1
    projection = partial.projection.sum(0)
    if config.norm == "layernorm":
        projection = projection - shift.sum(0)[:k, None]
    assert p.dynamic_weight is not None
    scaled = scaled.sum(0)
    return gradients._replace(
        dynamic_weight=projection if p.norm_weight is None else projection * p.norm_weight,
        scale_beta=scaled[:1] if config.scale else None,
        scale_alpha=scaled[1:k].sum(0, keepdim=True) if config.scale else None,
        norm_weight=None if p.norm_weight is None else (projection * p.dynamic_weight).sum(0),
    )


class Weights(NamedTuple):
    """Weight and bias [d] of the sub-layer's norm as the kernels take them."""

    weight: Tensor | None
    bias: Tensor | None


def _weights(norm: NormWeights | None) -> Weights:
    return Weights(None, None) if norm is None else Weights(norm.weight, norm.bias)


def site_of(h: Tensor, config: FracConfig, norm: NormWeights | None) -> Site:
    """What the kernels are compiled for, from a stream and the options."""
    m, c = config.rate, h.shape[1] // config.rate
    # At most eight chunks: loops over them are unrolled.
    block = max(16, min(128, triton.next_power_of_2(c)), triton.next_power_of_2(-(-c // 8)))
    return Site(
        M=m,
        C=c,
        R=_ROWS,
        BC=block,
        CHUNKS=-(-c // block),
        KP=max(16, triton.next_power_of_2(2 * m + 1)),
        DYNAMIC=config.dynamic,
        NORM=config.norm if config.dynamic else "none",
        EPS=config.norm_eps,
        TANH=config.tanh,
        SUB_NORM=norm.kind if norm is not None else "none",
        SUB_EPS=norm.eps if norm is not None else 1.0,
        ONE_PLUS=norm.one_plus if norm is not None else False,
        # The interpreter's products are wrong in bf16.
        EXACT=h.dtype == torch.float32 or (INTERPRETED and h.dtype == torch.bfloat16),
        KEEP_ROWS=c <= 512,
        KEEP_WEIGHTS=False,
    )


def _site(h: Tensor, config: FracConfig, norm: NormWeights | None) -> Site:
    site = site_of(h, config, norm)
    # Loops are unrolled over what the compiler knows to be constant; the interpreter wants plain values.
    return site if INTERPRETED else Site(*map(tl.constexpr, site))


def warps(h: Tensor) -> int:
    """Warps per program of the width connection's kernels."""
    return 8 if h.shape[1] >= 1024 else 4


def stages(site: Site, backward: bool) -> int:
    """Tiles that are on their way into shared memory, as many as fit: what waits there takes no registers."""
    c = int(getattr(site.C, "value", site.C))
    if c > 512:
        return 1
    return 2 if backward else 3


def _grid(h: Tensor, count: int) -> tuple[int]:
    tiles = -(-count // _ROWS)
    return (min(tiles, _PROGRAMS_PER_SM * _processors(h.device)),)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
