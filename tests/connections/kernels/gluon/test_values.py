"""The main kernels, compiled and emulated, against float64 autograd of the reference, in every order of their threads.

Every run watches for races between lanes and for memory that nothing was written to. Few shapes and options, since what
takes time is to compile.
"""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from laboratory.emulator import Options
from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, FracConnection, HyperConfig
from megatron_fc.connections.kernels import cuts, launch
from support import kernel_cases, kernel_reference
from support.isolation import stays_alone
from support.kernel_cases import HALF, check, wide
from support.kernel_traffic import counted, of

pytestmark = pytest.mark.slow
CASES = [
    (FracConfig(rate=4), 1024, 17, torch.bfloat16, "rmsnorm", False),
    (FracConfig(rate=2), 768, 17, torch.float16, "rmsnorm", True),  # 384 columns, padded
    (FracConfig(rate=8), 2048, 5, torch.bfloat16, "rmsnorm", False),
    pytest.param(FracConfig(rate=4), 4096, 5, torch.bfloat16, "rmsnorm", False, marks=pytest.mark.soak),
    (FracConfig(rate=2, norm="none", tanh=False, scale=False), 1024, 9, torch.float16, None, False),
]


def only_main(emulator: Emulator) -> bool:
    names = Counter(name for name, _ in emulator.launches)
    return not names["width_forward_kernel"] + names["width_backward_kernel"]


@pytest.mark.parametrize(("config", "width", "tokens", "dtype", "kind", "one_plus"), CASES)
def test_against_float64(
    emulator: Emulator,
    config: FracConfig,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str | None,
    one_plus: bool,
) -> None:
    """A width connection, and a boundary against its parts: streams to the bit, sums over columns to their rounding."""
    case = wide(config, width, tokens, dtype, kind, one_plus)
    check(case, HALF[dtype])
    found, parts = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=False))
    for name, expected in parts.items():
        if name == "g_beta":
            assert kernel_reference.error(found[name], expected.double()) < 1e-6
        else:
            assert torch.equal(found[name], expected), name
    assert only_main(emulator)


def test_low_halves_of_coefficients_count(emulator: Emulator) -> None:
    """Streams are the exact results, rounded once, where nothing else is rounded on the way.

    With coefficients of 16 bits, half of all values would be another.
    """
    case = wide(FracConfig(rate=2, norm="none", tanh=False, scale=False), 1024, 9, torch.float16, None)
    assert case.p.dynamic_weight is not None
    case = replace(case, p=case.p._replace(dynamic_weight=case.p.dynamic_weight.half().float()))
    (x, _, _), (g_h, *_) = kernel_reference.width_and_gradients(case)
    found, _, _ = launch.width_forward(case.h, case.operands, None)
    g, _ = launch.width_backward(case.g_x, case.g_beta, case.g_mixed, case.h, case.operands, None)
    assert found is not None
    for value, exact in ((found, x), (g, g_h)):
        assert (value == exact.half()).float().mean() > 0.98
    assert only_main(emulator)


@pytest.mark.parametrize("tokens", [0, 1, 6, 35])
def test_token_counts(emulator: Emulator, tokens: int) -> None:
    check(wide(FracConfig(rate=4), 1024, tokens, torch.bfloat16, "rmsnorm"), HALF[torch.bfloat16])
    assert only_main(emulator)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_token_that_is_not_finite_changes_no_other(emulator: Emulator, bad: float) -> None:
    stays_alone(kernel_reference.make(FracConfig(rate=4), 1024, 9, torch.bfloat16, "rmsnorm"), bad, "triton")
    assert only_main(emulator)


ORDERS = [
    *(Options(order="random", ctas="random", seed=seed, uninitialised="error") for seed in range(2)),
    Options(races="values"),
    Options(ctas="random", seed=2, threads=256),
]


def test_no_order_of_warps_and_programs_changes_a_bit(emulator: Emulator) -> None:
    case = kernel_reference.make(FracConfig(rate=4), 1024, 35, torch.bfloat16, "rmsnorm")

    def results() -> dict[str, torch.Tensor]:
        found, parts = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=False))
        return {f"boundary {name}": value for name, value in found.items()} | parts

    expected = results()
    for emulator.options in ORDERS:
        assert all(torch.equal(value, expected[name]) for name, value in results().items())


def test_bytes_of_memory(emulator: Emulator) -> None:
    """Rows of d elements per token: 2 and 4 of a width connection, 4 and 6 of a boundary; sums once per program."""
    case = kernel_reference.make(FracConfig(rate=4), 1024, 32, torch.bfloat16, "rmsnorm")
    site, row = (case.operands, case.norm), case.h.nbytes
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    incoming = (case.g_x, case.g_beta, case.g_mixed)
    with counted(emulator) as moved:
        x, *_ = launch.width_forward(case.h, *site)
    assert of(moved, case.h, x) == 2 * row
    with counted(emulator) as moved:
        h, x, *_ = launch.boundary_forward(depth, *site)
    assert of(moved, case.o, case.h, h, x) == 4 * row
    with counted(emulator) as moved:
        g_h, _, g_o, _ = launch.boundary_backward(*incoming, h, depth, *site)
    assert of(moved, case.g_x, case.g_mixed, h, case.o, g_h, g_o) == 6 * row
    with counted(emulator) as moved:
        g_h, _ = launch.width_backward(*incoming, case.h, *site)
    assert of(moved, case.g_x, case.g_mixed, case.h, g_h) == 4 * row
    sums = cuts.programs(32 * 4, case.h.device, cuts.Cut(4, 64, 2)) * 4 * (9 * 256 + 1024 + 16 * 5)
    parameters = 4 * (9 * 256 + 256) + 2 * 1024 + 4096
    rest = moved.total() - 4 * row - of(moved, case.g_beta)
    assert rest <= 2 * sums + 6 * parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identity_at_the_initial_values(emulator: Emulator, dtype: torch.dtype) -> None:
    """x is h, and h' what Megatron's own sum gives, to the bit."""
    case = kernel_reference.make(FracConfig(rate=4), 1024, 9, dtype, None)
    fresh = FracConnection(1024, case.config).operands()
    x, beta, alpha = launch.width_forward(case.h, fresh)
    assert x is not None
    assert torch.equal(x, case.h)
    h, x, _, _ = launch.boundary_forward(launch.DepthInputs(case.o, case.h, beta, alpha), fresh)
    assert torch.equal(h, case.o + case.h)
    assert torch.equal(x, h)
    assert only_main(emulator)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("config", "dtype", "forward"),
    [
        (FracConfig(rate=2), torch.bfloat16, "wide_forward_kernel"),
        (FracConfig(rate=4), torch.bfloat16, "main_forward_kernel"),
        (FracConfig(rate=8), torch.float16, "main_forward_kernel"),
        (HyperConfig(slots=2), torch.float16, "width_forward_kernel"),
        (HyperConfig(slots=4), torch.bfloat16, "width_forward_kernel"),
    ],
)
def test_the_widest_models(
    emulator: Emulator, config: FracConfig | HyperConfig, dtype: torch.dtype, forward: str
) -> None:
    """At d = 7168 tiles of backward, and of whole slots, do not fit: general kernels run there."""
    check(wide(config, 7168, 5, dtype, "rmsnorm"), HALF[dtype])
    names = Counter(name for name, _ in emulator.launches)
    assert (names[forward], names["width_backward_kernel"]) == (1, 1)
