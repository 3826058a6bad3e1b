"""Launches: functions on tensors, as in `megatron_fc.connections.eager`, plus the sub-layer's norm and the boundary.

Streams are [tokens, d] with d = m*c, rows contiguous. No function looks at a tensor's values or waits for the device.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fc.connections.kernels.depth import depth_backward_kernel, depth_forward_kernel
from megatron_fc.connections.kernels.gluon.choice import main_backward, main_forward
from megatron_fc.connections.kernels.sums import Gradients, Partial, reduce_kernel
from megatron_fc.connections.kernels.tiles import Site
from megatron_fc.connections.kernels.width import width_backward_kernel, width_forward_kernel
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands, refuse_low_precision
from megatron_fc.connections.per_slot import PerSlotParameters

INTERPRETED = bool(triton.knobs.runtime.interpret)
_ROWS = 16  # of a tile: what a tensor core's product needs


class Cut(NamedTuple):
    """How a kernel's work is cut: warps of a program, columns of a warp in a chunk, programs per processor of a GPU."""

    warps: int
    columns: int
    programs: int


# The best of what was predicted (benchmarks/results/predicted-h200.md). Programs of one warp meet no barriers, and
# registers leave room for many. A depth connection has few registers and many loads. Predictions take second reads for
# hits; docs/kernels.md says where they may not be.
WIDTH, WIDTH_BACKWARD, DEPTH = Cut(1, 64, 16), Cut(1, 32, 8), Cut(4, 32, 6)
if INTERPRETED:  # where time goes by operations, not by what they work on
    WIDTH, WIDTH_BACKWARD, DEPTH = Cut(8, 32, 1), Cut(8, 16, 1), Cut(8, 32, 1)
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


def depth_forward(depth: DepthInputs) -> Tensor:
    """h'_j = beta_j o_j + sum_i alpha_ij h_i, [..., d] in the dtype of h."""
    assert depth.h is not None
    assert depth.beta is not None
    out = torch.empty_like(depth.h)
    _launch(depth_forward_kernel, site_of(DEPTH, out, depth.beta.shape[1]), DEPTH, out, depth, out)
    return out


def depth_backward(g: Tensor, depth: DepthInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of o (in its dtype), of beta [T, m] in fp32 and of o's bias; that of the mixed residual is g itself."""
    depth, g_o, g_beta = _with_gradients(depth)
    site = site_of(DEPTH, g, g_beta.shape[1])
    partial = _partial(programs(_tokens(g) * site.M, g.device, DEPTH), g, site, output_bias=depth.bias)
    _launch(depth_backward_kernel, site, DEPTH, g, g, depth, partial)
    return g_o, g_beta, _reduced(partial, site, Gradients(output_bias=_like(depth.bias))).output_bias


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
    kernel, cut, site = width_forward_kernel, WIDTH, site_of(WIDTH, h, m, p, norm if want_x else None)
    if (main := main_forward(site, h, x, depth, p, norm)) is not None:
        kernel, site, cut = main.kernel, main.site, Cut(main.site.W, main.site.K, main.programs)
    _launch(kernel, site, cut, h, h, depth, p.parameters, _weights(norm), x, beta, alpha)
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
    weights = _weights(norm if g_x is not None else None)
    site, g_h = site_of(WIDTH_BACKWARD, h, p.fractions, p, norm if g_x is not None else None), torch.empty_like(h)
    kernel, cut = width_backward_kernel, WIDTH_BACKWARD
    if (main := main_backward(site, h, (g_x, g_mixed, g_beta), depth, p, norm)) is not None:
        kernel, site, cut = main.kernel, main.site, Cut(main.site.W, main.site.K, main.programs)
    partial = _partial(programs(_tokens(h) * site.M, h.device, cut), h, site, weights, depth.bias)
    arguments = (g_x, g_beta, g_mixed, h, depth, p.parameters, weights, g_h, partial)
    _launch(kernel, site, cut, h, *arguments)
    wanted = Gradients(*map(_like, (*p.parameters, *weights, depth.bias)))
    return g_h, _reduced(partial, site, wanted, p.parameters)


def _like(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _partial(
    count: int, h: Tensor, site: Site, weights: "Weights | None" = None, output_bias: Tensor | None = None
) -> Partial:
    """Of `count` programs; without `weights` those of a depth connection."""

    def of(*shape: int, wanted: bool = True) -> Tensor | None:
        return h.new_empty(count, *shape, dtype=torch.float32) if wanted else None

    d, output = site.M * site.C, of(site.M * site.C, wanted=output_bias is not None)
    if weights is None:
        return Partial(output_bias=output)
    return Partial(
        projection=of(2 * site.M + 1, site.C, wanted=site.DYNAMIC),
        table=of(site.M, site.KP),
        scaled=of(site.KP, wanted=site.DYNAMIC),
        shift=of(site.KP, wanted=site.NORM == "layernorm"),
        weight=of(d, wanted=weights.weight is not None),
        bias=of(d, wanted=weights.bias is not None),
        output_bias=output,
    )


def _reduced(partial: Partial, site: Site, wanted: Gradients, parameters: PerSlotParameters | None = None) -> Gradients:
    """All gradients of parameters, in one launch; without any, in none."""
    given = next((sums for sums in partial if sums is not None), None)
    if given is None:
        return wanted
    blocks = -(-site.C // _REDUCED_COLUMNS) if site.DYNAMIC else 0
    vectors = -(-site.M * site.C // _REDUCED_WIDE)
    arguments = (partial, parameters or PerSlotParameters(*[None] * 7), wanted, len(given))  # type: ignore[arg-type]
    constants = (_constant(site), blocks, _REDUCED_COLUMNS, _REDUCED_WIDE, _REDUCED_PROGRAMS)
    with _on(given.device):
        reduce_kernel[blocks + vectors + 1,](*arguments, *constants, num_warps=_REDUCED_WARPS)
    return wanted


class Weights(NamedTuple):
    """Weight and bias [d] of the sub-layer's norm as the kernels take them."""

    weight: Tensor | None
    bias: Tensor | None


def _weights(norm: NormWeights | None) -> Weights:
    return Weights(None, None) if norm is None else Weights(norm.weight, norm.bias)


def site_of(cut: Cut, h: Tensor, rate: int, p: Operands | None = None, norm: NormWeights | None = None) -> Site:
    """What the kernels are compiled for, from a stream and the options; a depth connection has none."""
    c = h.shape[-1] // rate
    covered = max(16, triton.next_power_of_2(c))
    warps = min(cut.warps, covered // 16)
    padded = max(_ROWS, triton.next_power_of_2(2 * rate + 1))
    columns = min(cut.columns, 1024 // padded, covered // warps)  # longer tables leave registers for fewer
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
        KP=padded,
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


def _launch(kernel: Any, site: Site, cut: Cut, stream: Tensor, *arguments: Any) -> None:
    count = _tokens(stream) * site.M
    if not count:
        return
    grid = (programs(count, stream.device, cut),)
    with _on(stream.device):
        kernel[grid](*arguments, count, S=_constant(site), num_warps=site.W, num_stages=1)


def _constant(site: Site) -> Site:
    """Loops are unrolled over what the compiler knows to be constant; the interpreter wants plain values."""
    return site if INTERPRETED else Site(*map(tl.constexpr, site))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever has the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def programs(count: int, device: torch.device, cut: Cut) -> int:
    """Programs for so many rows: they go on to the next tile until none is left."""
    return min(-(-count // _ROWS), cut.programs * _processors(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
