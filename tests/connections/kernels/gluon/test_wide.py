"""The main kernels of wide slots, compiled and emulated, against float64 autograd of the reference.

Every run watches for races between lanes and for memory that nothing was written to.
"""

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from laboratory.emulator import Options
from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import launch
from megatron_fc.connections.kernels.gluon import choice
from support import kernel_cases, kernel_reference
from support.isolation import stays_alone
from support.kernel_cases import HALF, check, wide
from support.kernel_traffic import counted, of

pytestmark = pytest.mark.slow
BF16, FP16 = torch.bfloat16, torch.float16
FOUR, TWO = HyperConfig(slots=4), HyperConfig(slots=2)
PLAIN = HyperConfig(slots=4, norm="none", tanh=False, scale=False)
ROOM = 227 * 1024
# Config, width, tokens, dtype, norm, its weight less one, shared memory, general kernels that run. In 80 KiB there is
# room for 8 rows of a backward tile, in 44 for 8 of a forward one.
CASES = [
    (FOUR, 1024, 17, BF16, "rmsnorm", False, ROOM, 0),
    (FOUR, 1024, 7, BF16, "rmsnorm", True, 80 * 1024, 0),
    (FOUR, 1024, 7, BF16, "rmsnorm", True, 44 * 1024, 3),
    (TWO, 768, 17, FP16, "rmsnorm", False, ROOM, 0),  # half of the second chunk is padding
    (PLAIN, 512, 9, FP16, None, False, ROOM, 0),
]
MODELS = [
    (FOUR, 2048, 40, BF16, "rmsnorm"),
    (TWO, 2048, 17, BF16, "rmsnorm"),
    (FOUR, 4096, 9, FP16, "rmsnorm"),
    (TWO, 4096, 9, FP16, "rmsnorm"),
    (FracConfig(rate=2), 4096, 9, BF16, "rmsnorm"),
    (FracConfig(rate=2), 5120, 5, FP16, "rmsnorm"),
]


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    """What was chosen for another room is forgotten."""
    for remembered in (choice._chosen, choice._chosen_for_depth):
        remembered.cache_clear()
    yield
    for remembered in (choice._chosen, choice._chosen_for_depth):
        remembered.cache_clear()


def general_runs(emulator: Emulator) -> int:
    names = Counter(name for name, _ in emulator.launches)
    return names["width_forward_kernel"] + names["width_backward_kernel"]


def check_all(case: kernel_reference.Case) -> None:
    """Also a boundary against its parts: streams to the bit, sums over columns to their rounding."""
    check(case, HALF[case.h.dtype])
    found, parts = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=False))
    for name, expected in parts.items():
        if name in ("g_beta", "g_o"):  # what slots give is added up in another order
            assert kernel_reference.error(found[name], expected.double()) < 1e-6
        else:
            assert torch.equal(found[name], expected), name


@pytest.mark.parametrize(("config", "width", "tokens", "dtype", "kind", "one_plus", "room", "general"), CASES)
def test_against_float64(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    config: HyperConfig,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str | None,
    one_plus: bool,
    room: int,
    general: int,
) -> None:
    monkeypatch.setattr(choice, "_room", lambda device: room)
    check_all(wide(config, width, tokens, dtype, kind, one_plus))
    assert general_runs(emulator) == general


@pytest.mark.soak
@pytest.mark.parametrize(("config", "width", "tokens", "dtype", "kind"), MODELS)
def test_widths_of_models(
    emulator: Emulator, config: FracConfig, width: int, tokens: int, dtype: torch.dtype, kind: str
) -> None:
    check_all(wide(config, width, tokens, dtype, kind))
    assert general_runs(emulator) == 0


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_token_counts(emulator: Emulator, tokens: int) -> None:
    """The gradient of gamma, which what the norm divides by leaves little of, is held against a sum of more tokens."""
    case = wide(FOUR, 1024, tokens, BF16, None)
    check(case, HALF[BF16])
    assert general_runs(emulator) == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_token_that_is_not_finite_changes_no_other(emulator: Emulator, bad: float) -> None:
    stays_alone(kernel_reference.make(FOUR, 1024, 9, BF16, "rmsnorm"), bad, "triton")
    assert general_runs(emulator) == 0


ORDERS = [
    Options(order="random", ctas="random", seed=1, uninitialised="error"),
    Options(races="values"),
    Options(ctas="random", seed=2, threads=256),
]


def test_no_order_of_warps_and_programs_changes_a_bit(emulator: Emulator) -> None:
    case = kernel_reference.make(FOUR, 1024, 35, BF16, "rmsnorm")

    def results() -> dict[str, torch.Tensor]:
        found, parts = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=False))
        return {f"boundary {name}": value for name, value in found.items()} | parts

    expected = results()
    for emulator.options in ORDERS:
        assert all(torch.equal(value, expected[name]) for name, value in results().items())


def test_bytes_of_memory(emulator: Emulator) -> None:
    """Rows of d elements per token: n + 1 and 3 n + 1 of a width connection, 2 n + 2 and 3 n + 3 of a boundary."""
    case = kernel_reference.make(FOUR, 1024, 32, BF16, "rmsnorm")
    site, row = (case.operands, case.norm), case.o.nbytes
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)
    incoming = (case.g_x, case.g_beta, case.g_mixed)
    with counted(emulator) as moved:
        x, *_ = launch.width_forward(case.h, *site)
    assert of(moved, case.h, x) == 5 * row
    with counted(emulator) as moved:
        h, x, *_ = launch.boundary_forward(depth, *site)
    assert of(moved, case.o, case.h, h, x) == 10 * row
    with counted(emulator) as moved:
        g_h, _, g_o, _ = launch.boundary_backward(*incoming, h, depth, *site)
    assert of(moved, case.g_x, case.g_mixed, h, case.o, g_h, g_o) == 15 * row
    with counted(emulator) as moved:
        g_h, _ = launch.width_backward(*incoming, case.h, *site)
    assert of(moved, case.g_x, case.g_mixed, case.h, g_h) == 13 * row
    with counted(emulator) as moved:
        h = launch.depth_forward(depth)
    assert of(moved, case.o, case.h, h) == 9 * row


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_identity_at_the_initial_values(emulator: Emulator, dtype: torch.dtype) -> None:
    """x is the mean of equal slots, and h' what Megatron's own sum gives in each, to the bit."""
    case = kernel_reference.make(FOUR, 1024, 9, dtype, None)
    h = case.o.repeat(1, 4)
    fresh = FOUR.build(1024).operands()
    x, beta, alpha = launch.width_forward(h, fresh)
    assert x is not None
    assert torch.equal(x, case.o)
    following, x, _, _ = launch.boundary_forward(launch.DepthInputs(case.g_x, h, beta, alpha), fresh)
    assert torch.equal(following, (case.o + case.g_x).repeat(1, 4))
    assert torch.equal(x, case.o + case.g_x)
