"""Bytes that the kernels move between memory and cache, counted in the emulator, against their headers' tables."""

from collections import Counter

import pytest
import torch

from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import cuts, launch
from support import kernel_reference
from support.kernel_traffic import counted, of

pytestmark = pytest.mark.usefixtures("general_kernels")  # `gluon/test_values.py` counts the main ones
TILES = 4  # two for a program of the width connection's backward pass
SHAPES = [  # OLMoE-7B's; docs/kernels.md has other shapes
    (FracConfig(rate=4), 2048),
    (HyperConfig(slots=2), 512),
    (HyperConfig(slots=4), 512),
]


def rows(case: kernel_reference.Case, moved: Counter[int], *tensors: torch.Tensor | None) -> float:
    """Bytes moved, in rows: the size of a sub-layer's input."""
    return of(moved, *tensors) / case.o.nbytes


@pytest.fixture(params=SHAPES, ids=lambda shape: shape[0].label)
def case(request: pytest.FixtureRequest) -> kernel_reference.Case:
    config, width = request.param
    return kernel_reference.make(config, width, TILES * 16 // config.slots, torch.bfloat16, "rmsnorm")


def coefficient_bytes(case: kernel_reference.Case) -> tuple[int, int]:
    """Of beta or its gradient, and of alpha, in fp32."""
    return len(case.h) * 4 * case.config.slots, len(case.h) * 4 * case.config.slots**2


def expansion(case: kernel_reference.Case) -> int:
    """r = n/m."""
    return case.config.slots // case.config.fractions


def test_width(emulator: Emulator, case: kernel_reference.Case) -> None:
    site, (beta_bytes, alpha_bytes), r = (case.operands, case.norm), coefficient_bytes(case), expansion(case)
    with counted(emulator) as moved:
        x, beta, alpha = launch.width_forward(case.h, *site)
    assert rows(case, moved, case.h, x) == r + 1
    assert of(moved, beta, alpha) == beta_bytes + alpha_bytes
    with counted(emulator) as moved:
        g_h, _ = launch.width_backward(case.g_x, case.g_beta, case.g_mixed, case.h, *site)
    assert rows(case, moved, case.g_x, case.g_mixed, case.h, g_h) == 3 * r + 1
    assert of(moved, case.g_beta) == beta_bytes
    rest = moved.total() - of(moved, case.g_x, case.g_mixed, case.h, g_h, case.g_beta)
    # Parameters are read once per program and sums written once per program, neither once per tile. One launch reads
    # the sums, and parameters once more, and writes the gradients.
    d, n, m = case.o.shape[1], case.config.slots, case.config.fractions
    c, k = d // m, 1 + m + n
    parameters, sums = 4 * k * c + 4 * c + 2 * d, 4 * k * c + 4 * d
    small = 4096 + 16 * 4 * 32  # static parameters and tables of coefficients
    programs = cuts.programs(TILES * 16, case.h.device, cuts.WIDTH_BACKWARD)
    assert rest <= programs * (parameters + 2 * sums + small) + 2 * parameters + small


def test_depth(emulator: Emulator, case: kernel_reference.Case) -> None:
    (beta_bytes, alpha_bytes), r = coefficient_bytes(case), expansion(case)
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    with counted(emulator) as moved:
        out = launch.depth_forward(depth)
    assert rows(case, moved, case.o, case.h, out) == 2 * r + 1
    assert of(moved, depth.beta, depth.alpha) == beta_bytes + alpha_bytes
    with counted(emulator) as moved:
        g_o, g_beta, _ = launch.depth_backward(case.g_mixed, depth)
    assert rows(case, moved, case.g_mixed, case.o, g_o) == r + 2
    assert of(moved, depth.beta, g_beta) == 2 * beta_bytes


def test_boundary(emulator: Emulator, case: kernel_reference.Case) -> None:
    site, r = (case.operands, case.norm), expansion(case)
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    with counted(emulator) as moved:
        h, x, _, _ = launch.boundary_forward(depth, *site)
    assert rows(case, moved, case.o, case.h, h, x) == 2 * r + 2
    incoming = (case.g_x, case.g_beta, case.g_mixed)
    with counted(emulator) as moved:
        g_h, _, g_o, _ = launch.boundary_backward(*incoming, h, depth, *site)
    assert rows(case, moved, case.g_x, case.g_mixed, h, case.o, g_h, g_o) == 3 * r + 3


def test_given_coefficients(emulator: Emulator, case: kernel_reference.Case) -> None:
    r, (_, alpha_bytes), m = expansion(case), coefficient_bytes(case), case.config.fractions
    alpha = case.coefficients[1]
    gamma = alpha[:, : case.config.slots * m].contiguous()
    with counted(emulator) as moved:
        x = launch.given_width_forward(case.h, gamma, m, case.norm)
    assert rows(case, moved, case.h, x) == r + 1
    assert of(moved, gamma) == gamma.nbytes
    with counted(emulator) as moved:
        g_h, *of_tables, _ = launch.given_width_backward(case.g_x, case.g_mixed, case.h, gamma, alpha, m, case.norm)
    assert rows(case, moved, case.g_x, case.g_mixed, case.h, g_h) == 3 * r + 1
    assert of(moved, gamma, alpha, *of_tables) == 2 * (gamma.nbytes + alpha_bytes)
