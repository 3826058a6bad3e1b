"""Bytes that the kernels move between memory and cache, counted in the emulator, against their headers' tables."""

from collections import Counter

import pytest
import torch

from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig
from megatron_fc.connections.kernels import launch
from support import kernel_reference
from support.kernel_traffic import counted, of

pytestmark = pytest.mark.usefixtures("general_kernels")  # `gluon/test_values.py` counts the main ones
RATE, WIDTH = 4, 2048  # OLMoE-7B's; docs/kernels.md has other shapes
TILES = 4  # two for a program of the width connection's backward pass


def rows(moved: Counter[int], *tensors: torch.Tensor | None) -> float:
    """Bytes moved, in rows: the size of a stream."""
    assert tensors[0] is not None
    return of(moved, *tensors) / tensors[0].nbytes


@pytest.fixture
def case() -> kernel_reference.Case:
    return kernel_reference.make(FracConfig(rate=RATE), WIDTH, TILES * 16 // RATE, torch.bfloat16, "rmsnorm")


def coefficient_bytes(case: kernel_reference.Case) -> tuple[int, int]:
    """Of beta or its gradient, and of alpha, in fp32."""
    return len(case.h) * 4 * case.config.rate, len(case.h) * 4 * case.config.rate**2


def test_width(emulator: Emulator, case: kernel_reference.Case) -> None:
    site, (beta_bytes, alpha_bytes) = (case.operands, case.norm), coefficient_bytes(case)
    with counted(emulator) as moved:
        x, beta, alpha = launch.width_forward(case.h, *site)
    assert rows(moved, case.h, x) == 2
    assert of(moved, beta, alpha) == beta_bytes + alpha_bytes
    with counted(emulator) as moved:
        g_h, _ = launch.width_backward(case.g_x, case.g_beta, case.g_mixed, case.h, *site)
    assert rows(moved, case.g_x, case.g_mixed, case.h, g_h) == 4
    assert of(moved, case.g_beta) == beta_bytes
    rest = moved.total() - of(moved, case.g_x, case.g_mixed, case.h, g_h, case.g_beta)
    # Parameters are read once per program and sums written once per program, neither once per tile. One launch reads
    # the sums, and parameters once more, and writes the gradients.
    c, k = WIDTH // RATE, 2 * RATE + 1
    parameters, sums = 4 * k * c + 4 * c + 2 * WIDTH, 4 * k * c + 4 * WIDTH
    small = 4096 + 16 * 4 * 32  # static parameters and tables of coefficients
    programs = launch.programs(TILES * 16, case.h.device, launch.WIDTH_BACKWARD)
    assert rest <= programs * (parameters + 2 * sums + small) + 2 * parameters + small


def test_depth(emulator: Emulator, case: kernel_reference.Case) -> None:
    beta_bytes, alpha_bytes = coefficient_bytes(case)
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    with counted(emulator) as moved:
        out = launch.depth_forward(depth)
    assert rows(moved, case.o, case.h, out) == 3
    assert of(moved, depth.beta, depth.alpha) == beta_bytes + alpha_bytes
    with counted(emulator) as moved:
        g_o, g_beta, _ = launch.depth_backward(case.g_x, depth)
    assert rows(moved, case.g_x, case.o, g_o) == 3
    assert of(moved, depth.beta, g_beta) == 2 * beta_bytes


def test_boundary(emulator: Emulator, case: kernel_reference.Case) -> None:
    site = (case.operands, case.norm)
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    with counted(emulator) as moved:
        h, x, _, _ = launch.boundary_forward(depth, *site)
    assert rows(moved, case.o, case.h, h, x) == 4
    incoming = (case.g_x, case.g_beta, case.g_mixed)
    with counted(emulator) as moved:
        g_h, _, g_o, _ = launch.boundary_backward(*incoming, h, depth, *site)
    assert rows(moved, case.g_x, case.g_mixed, h, case.o, g_h, g_o) == 6
