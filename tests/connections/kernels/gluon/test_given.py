"""The main kernels of wide slots with coefficients that are given, compiled and emulated, against float64 autograd."""

import math
from collections import Counter

import pytest
import torch

from laboratory.emulator import Options
from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import launch
from support import kernel_reference
from support.isolation import reaches_its_own_token
from support.kernel_cases import HALF, check_given, given_coefficients, wide
from support.kernel_traffic import counted, of

pytestmark = pytest.mark.slow
BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    (HyperConfig(slots=4), 1024, 17, BF16, "rmsnorm", False),
    (HyperConfig(slots=2), 768, 9, FP16, "rmsnorm", True),  # half of the second chunk is padding
    (HyperConfig(slots=4), 512, 1, FP16, None, False),
    (FracConfig(rate=2), 1024, 9, BF16, "rmsnorm", False),
]


@pytest.mark.parametrize(("config", "width", "tokens", "dtype", "kind", "one_plus"), CASES)
def test_against_float64(
    emulator: Emulator,
    config: FracConfig | HyperConfig,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str | None,
    one_plus: bool,
) -> None:
    """Where one of the two gradients is absent the general kernel runs: for that of x, and for the mixed residual's."""
    check_given(wide(config, width, tokens, dtype, kind, one_plus), HALF[dtype])
    names = Counter(name for name, _ in emulator.launches)
    assert (names["wide_forward_kernel"], names["wide_backward_kernel"], names["width_backward_kernel"]) == (1, 1, 2)


def results(case: kernel_reference.Case, streams: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both passes, and the depth connection between them."""
    gamma, alpha = given_coefficients(case)
    beta, _ = case.coefficients
    x = launch.given_width_forward(streams["h"], gamma, 1, case.norm)
    depth = launch.DepthInputs(streams["o"], streams["h"], beta, alpha)
    g_o, _, _ = launch.depth_backward(streams["g"], depth)
    back = launch.given_width_backward(streams["g_x"], streams["g"], streams["h"], gamma, alpha, 1, case.norm)
    g_h, g_gamma, g_alpha, gradients = back
    assert g_gamma is not None
    assert g_alpha is not None
    assert gradients.weight is not None
    forward = {"x": x, "following": launch.depth_forward(depth)}
    tables = {"g_gamma": g_gamma, "g_alpha": g_alpha}
    return forward | tables | {"g_h": g_h, "g_o": g_o, "norm": gradients.weight}


def case_of(tokens: int) -> tuple[kernel_reference.Case, dict[str, torch.Tensor]]:
    case = kernel_reference.make(HyperConfig(slots=4), 1024, tokens, BF16, "rmsnorm")
    return case, {"h": case.h, "o": case.o, "g_x": case.g_x, "g": case.g_mixed}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_token_that_is_not_finite_changes_no_other(emulator: Emulator, bad: float) -> None:
    case, _ = case_of(9)

    def of_tokens(streams: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in results(case, streams).items() if name != "norm"}

    reaches_its_own_token(case, bad, of_tokens)


def test_no_order_of_warps_and_programs_changes_a_bit(emulator: Emulator) -> None:
    case, streams = case_of(35)
    expected = results(case, streams)
    for emulator.options in (
        Options(order="random", ctas="random", seed=1, uninitialised="error"),
        Options(races="values"),
        Options(ctas="random", seed=2, threads=256),
    ):
        assert all(torch.equal(value, expected[name]) for name, value in results(case, streams).items())


def test_bytes_of_memory(emulator: Emulator) -> None:
    """n + 1 and 3 n + 1 rows of d elements per token."""
    case, _ = case_of(32)
    gamma, alpha = given_coefficients(case)
    with counted(emulator) as moved:
        x = launch.given_width_forward(case.h, gamma, 1, case.norm)
    assert of(moved, case.h, x) == 5 * case.o.nbytes
    with counted(emulator) as moved:
        g_h, *_ = launch.given_width_backward(case.g_x, case.g_mixed, case.h, gamma, alpha, 1, case.norm)
    assert of(moved, case.g_x, case.g_mixed, case.h, g_h) == 13 * case.o.nbytes


@pytest.mark.soak
@pytest.mark.parametrize(("slots", "width"), [(4, 2048), (2, 4096), (4, 4096)])
def test_widths_of_models(emulator: Emulator, slots: int, width: int) -> None:
    check_given(wide(HyperConfig(slots=slots), width, 9, BF16, "rmsnorm"), HALF[BF16])
