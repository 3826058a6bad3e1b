"""Options of connections, tolerances and checks for the kernels: interpreted, emulated and on a card."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import launch
from support import kernel_reference

# Sums of up to 4096 terms in fp32, and norms whose statistics come from products of rows; measured 9e-6, in a gradient
# of one element.
FP32 = 2e-5
# Without tanh or norm z is not bounded, and gradients near cancellation lose digits: measured 2.3e-5.
UNBOUNDED = 1e-4
# One rounding of a result to 2^-9 or 2^-12 is 1.7e-3 or 2e-4 on average; gradients of x are rounded on the way, too.
HALF = {torch.bfloat16: 8e-3, torch.float16: 2e-3}

NORMS = ("rmsnorm", "layernorm", "none")
CONFIGS = [
    *(FracConfig(rate=rate) for rate in (1, 2, 4, 8)),
    *(FracConfig(rate=rate, dynamic=False) for rate in (1, 2, 4, 8)),
    *(
        FracConfig(rate=2, norm=norm, tanh=tanh, scale=scale)
        for norm, tanh, scale in itertools.product(NORMS, (True, False), (True, False))
        if (norm, tanh, scale) != ("rmsnorm", True, True)
    ),
    *(FracConfig(rate=rate, norm=norm) for rate in (4, 8) for norm in ("layernorm", "none")),
]


def name(config: FracConfig | HyperConfig) -> str:
    return f"{config.label}-{config.norm}-{'tanh' if config.tanh else 'linear'}-{'s' if config.scale else '1'}"


def wide(
    config: FracConfig | HyperConfig,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str | None,
    one_plus: bool = False,
) -> kernel_reference.Case:
    """With a projection that leaves tanh its slope at these widths; gradients of the scales cancel otherwise."""
    case = kernel_reference.make(config, width, tokens, dtype, kind, one_plus)
    assert case.p.dynamic_weight is not None
    narrow = case.p.dynamic_weight * (width / config.fractions / 16) ** -0.5
    return replace(case, p=case.p._replace(dynamic_weight=narrow))


def check(case: kernel_reference.Case, tolerance: float) -> None:
    outputs, gradients = kernel_reference.width_and_gradients(case)
    found = launch.width_forward(case.h, case.operands, case.norm)
    back = launch.width_backward(case.g_x, case.g_beta, case.g_mixed, case.h, case.operands, case.norm)
    flat = [q for q in (back[0], *back[1]) if q is not None]
    for one, expected in zip(found, outputs, strict=True):
        assert one is not None
        assert kernel_reference.error(one, expected) < tolerance
    for one, expected in zip(flat, gradients, strict=True):
        assert kernel_reference.error(one, expected) < tolerance

    beta, alpha = case.coefficients
    depth = launch.DepthInputs(case.o, case.h, beta, alpha)
    assert kernel_reference.error(launch.depth_forward(depth), kernel_reference.depth(case)) < tolerance
    found_of_o_and_beta = launch.depth_backward(case.g_mixed, depth)[:2]
    for one, expected in zip(found_of_o_and_beta, kernel_reference.depth_gradients(case), strict=True):
        assert kernel_reference.error(one, expected) < tolerance


def given_coefficients(case: kernel_reference.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma [T, n*m] and alpha [T, n*n] of a case, random and not symmetric."""
    n, random = case.config.slots, torch.Generator().manual_seed(case.h.numel())
    sizes = (n * case.config.fractions, n * n)
    gamma, alpha = (torch.randn(len(case.h), size, generator=random).to(case.h.device) for size in sizes)
    return gamma, alpha


def check_given(case: kernel_reference.Case, tolerance: float) -> None:
    """Coefficients from elsewhere, as a manifold's."""
    m = case.config.fractions
    gamma, alpha = given_coefficients(case)
    x, gradients = kernel_reference.given_and_gradients(case, gamma, alpha)
    assert kernel_reference.error(launch.given_width_forward(case.h, gamma, m, case.norm), x) < tolerance

    def backward(g_x: torch.Tensor | None, g_mixed: torch.Tensor | None) -> list[torch.Tensor]:
        *found, of_norm = launch.given_width_backward(g_x, g_mixed, case.h, gamma, alpha, m, case.norm)
        return [t for t in (*found, *of_norm) if t is not None]

    for one, expected in zip(backward(case.g_x, case.g_mixed), gradients, strict=True):
        assert kernel_reference.error(one, expected) < tolerance
    of_x, of_mixed = backward(case.g_x, None), backward(None, case.g_mixed)
    assert len(of_x) == len(gradients) - 1
    assert len(of_mixed) == 2
    assert kernel_reference.error(of_x[0].double() + of_mixed[0].double(), gradients[0]) < 2 * tolerance


def passes(case: kernel_reference.Case) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The site's four passes as `isolation.reaches_its_own_token` runs them."""

    def run(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        h, site = given["h"], (case.operands, case.norm)
        x, beta, alpha = launch.width_forward(h, *site)
        assert x is not None
        depth = launch.DepthInputs(given["o"], h, beta, alpha)
        g_o, g_beta, _ = launch.depth_backward(given["g"], depth)
        g_h, _ = launch.width_backward(given["g_x"], g_beta, given["g"], h, *site)
        return {"x": x, "following": launch.depth_forward(depth), "g_h": g_h, "g_o": g_o}

    return run


def depth_inputs(case: kernel_reference.Case, dropout: bool) -> launch.DepthInputs:
    """The case's depth connection, and with `dropout` a bias and a dropout of a quarter as Megatron's slot has them."""
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    if not dropout:
        return depth
    return depth._replace(bias=case.g_x[0].clone(), seed=torch.tensor([7]), dropout=0.25)


def boundary_and_parts(
    case: kernel_reference.Case, depth: launch.DepthInputs
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All that a boundary computes, forward and backward, and the same of its depth and its width connection."""
    site, incoming = (case.operands, case.norm), (case.g_x, case.g_beta, case.g_mixed)
    h, *after = launch.boundary_forward(depth, *site)
    g_h, gradients, g_o, g_beta = launch.boundary_backward(*incoming, h, depth, *site)
    found = {"h'": h, **_named(after, g_h, gradients), "g_o": g_o, "g_beta": g_beta}
    parts, (following, others) = launch.width_forward(h, *site), launch.width_backward(*incoming, h, *site)
    # Of the boundary's own gradient of h', which it does not write in between.
    expected_o, expected_beta, output_bias = launch.depth_backward(g_h, depth)
    expected = {"h'": launch.depth_forward(depth), "g_o": expected_o, "g_beta": expected_beta}
    return found, expected | _named(parts, following, others._replace(output_bias=output_bias))


def _named(
    outputs: Sequence[torch.Tensor | None], g_h: torch.Tensor, gradients: launch.Gradients
) -> dict[str, torch.Tensor]:
    named = {**dict(zip(("x", "beta", "alpha"), outputs, strict=True)), "g_h": g_h, **gradients._asdict()}
    return {name: value for name, value in named.items() if value is not None}
