"""Compiled kernels do not depend on the order of warps and programs; and what is broken in them is noticed.

One site of bf16 in every test, so that its kernels are compiled once.
"""

import re
from collections.abc import Callable

import pytest
import torch

from laboratory.emulator import Options, RaceError
from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig
from megatron_fc.connections.kernels import cuts, launch
from support import kernel_cases, kernel_reference
from support.kernel_cases import HALF

Edit = Callable[[str, str], str]
pytestmark = pytest.mark.slow
LIMIT = HALF[torch.bfloat16]


def make(tokens: int = 33) -> kernel_reference.Case:
    return kernel_reference.make(FracConfig(rate=4), 256, tokens, torch.bfloat16, "rmsnorm")


def all_results(case: kernel_reference.Case) -> dict[str, torch.Tensor]:
    """Of the boundary with bias and dropout, and of its parts."""
    boundary, parts = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=True))
    return {f"boundary {name}": value for name, value in boundary.items()} | parts


def test_a_boundary_is_its_parts(emulator: Emulator) -> None:
    """The streams to the bit, and what is a sum in another order to its rounding."""
    case = make()
    for dropout in (False, True):
        found, expected = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout))
        assert torch.equal(found["h'"], expected["h'"])
        for name, value in expected.items():
            assert kernel_reference.error(found[name], value.double()) < LIMIT, name


ORDERS = [
    *(Options(order="random", ctas="random", seed=seed, uninitialised="error") for seed in range(2)),
    Options(ctas="random", seed=2, threads=256),  # one program after another
    Options(threads=10**6),  # all at once
]


@pytest.mark.parametrize("options", ORDERS)
def test_no_order_of_warps_and_programs_changes_a_bit(emulator: Emulator, options: Options) -> None:
    expected = all_results(case := make())
    emulator.options = options
    found = all_results(case)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def nth(pattern: str, n: int, replacement: Callable[[re.Match[str]], str]) -> Edit:
    """Change the n-th place of a kernel's text that matches."""

    def edit(name: str, text: str) -> str:
        match = list(re.finditer(pattern, text))[n]
        return text[: match.start()] + replacement(match) + text[match.end() :]

    return edit


def error_of_x(emulator: Emulator, options: Options, edit: Edit) -> float:
    """Of a width connection whose kernel is edited."""
    case = make(17)
    emulator.options, emulator.edit = options, edit
    x, _, _ = launch.width_forward(case.h, case.operands, case.norm)
    assert x is not None
    return kernel_reference.error(x, kernel_reference.width_and_gradients(case)[0][0])


MMA = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}), \{ (%r\d+), (%r\d+) \}"


def test_swapped_registers_of_a_product_are_noticed(emulator: Emulator) -> None:
    assert error_of_x(emulator, Options(), lambda name, text: text) < LIMIT
    assert error_of_x(emulator, Options(), nth(MMA, 0, lambda m: f"{m[1]}, {{ {m[3]}, {m[2]} }}")) > 10 * LIMIT


def test_dropped_barriers_are_noticed(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the barriers are needed: without one there is a race, and a random order changes what comes out.

    Where a program has more warps than it is launched with.
    """
    monkeypatch.setattr(launch, "WIDTH", cuts.Cut(8, 32, 2))
    noticed = changed = 0
    for n in range(8):
        drop = nth(r"bar\.sync\s+0;", n, lambda match: "")
        assert error_of_x(emulator, Options(), drop) < LIMIT, "side by side nothing shows"
        try:
            error_of_x(emulator, Options(races="warps"), drop)
        except RaceError:
            noticed += 1
            errors = [error_of_x(emulator, Options(order="random", seed=seed), drop) for seed in range(3)]
            changed += not max(errors) < LIMIT
    assert noticed >= 3
    assert changed >= 1
