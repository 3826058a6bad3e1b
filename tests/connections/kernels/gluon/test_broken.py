"""What is broken in a main kernel is noticed: its text is changed before it runs.

Unchanged, results are those that `test_values.py` holds against float64.
"""

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from laboratory.emulator import Options
from laboratory.emulator.driver import Emulator, emulated
from laboratory.emulator.errors import AccessError, Hang, RaceError
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import launch
from support import kernel_cases, kernel_reference

pytestmark = pytest.mark.slow
RANDOM = Options(order="random", seed=3)
ROUNDING = 1e-5  # more than another order of additions, less than a product that is wrong in its low half
BARRIER = r"bar\.sync\s+0;"
WAIT, COMMIT = r"cp\.async\.wait_group\s+\w+;", r"cp\.async\.commit_group;"
PRODUCT = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}), \{ (%r\d+), (%r\d+) \}"
LOWER = r"setp\.lt\.s32"
TRANSPOSED, AS_IT_LIES = r"(ldmatrix\S+x4)\.trans", r"(ldmatrix\S+x4)(\.shared)"
EXCHANGE = r"(shfl\.sync\.bfly\.b32\s+\S+ \S+) (\w+),"
Change = Callable[[re.Match[str]], str]
Broken = tuple[str, str, int, Change]


def left_out(match: re.Match[str]) -> str:
    return ""


def swapped(match: re.Match[str]) -> str:
    return f"{match[1]}, {{ {match[3]}, {match[2]} }}"


def by_one_too_many(match: re.Match[str]) -> str:
    return "setp.le.s32"


def not_transposed(match: re.Match[str]) -> str:
    return match[1]


def transposed(match: re.Match[str]) -> str:
    return f"{match[1]}.trans{match[2]}"


def with_another_lane(match: re.Match[str]) -> str:
    return f"{match[1]} {int(match[2], 0) ^ 3},"


class Boundary:
    """A boundary in the emulator: results of either direction, as they are and with a changed kernel."""

    def __init__(self, emulator: Emulator, config: FracConfig | HyperConfig) -> None:
        self.emulator = emulator
        self.case = kernel_reference.make(config, 1024, 18, torch.bfloat16, "rmsnorm")
        self.depth = kernel_cases.depth_inputs(self.case, dropout=False)
        self.site = (self.case.operands, self.case.norm)
        emulator.options = RANDOM
        self.h = launch.boundary_forward(self.depth, *self.site)[0]
        self.whole = {direction: self.run(direction) for direction in ("forward", "backward")}

    def run(self, direction: str) -> list[torch.Tensor]:
        if direction == "forward":
            return list(launch.boundary_forward(self.depth, *self.site))
        incoming = (self.case.g_x, self.case.g_beta, self.case.g_mixed)
        g_h, gradients, g_o, g_beta = launch.boundary_backward(*incoming, self.h, self.depth, *self.site)
        return [g_h, g_o, g_beta, *(g for g in gradients if g is not None)]

    def notices(self, direction: str, pattern: str, n: int, change: Change) -> bool:
        """Whether a kernel fails, gives other results or has a race with the n-th match of a pattern changed."""

        def edit(name: str, text: str) -> str:
            if not name.startswith(("main", "wide")):
                return text
            match = list(re.finditer(pattern, text))[n]
            return text[: match.start()] + change(match) + text[match.end() :]

        self.emulator.edit = edit
        try:
            self.emulator.options = RANDOM
            found = self.run(direction)
            pairs = zip(found, self.whole[direction], strict=True)
            if not all(kernel_reference.error(one, other.double()) < ROUNDING for one, other in pairs):
                return True
            self.emulator.options = Options(races="lanes")
            self.run(direction)
        except (AccessError, Hang, RaceError):
            return True
        finally:
            self.emulator.edit = lambda name, text: text
        return False


class Given(Boundary):
    """A width connection whose coefficients are given, in the same way."""

    def run(self, direction: str) -> list[torch.Tensor]:
        gamma, alpha = kernel_cases.given_coefficients(self.case)
        if direction == "forward":
            return [launch.given_width_forward(self.case.h, gamma, 1, self.case.norm)]
        streams = (self.case.g_x, self.case.g_mixed, self.case.h)
        *found, of_norm = launch.given_width_backward(*streams, gamma, alpha, 1, self.case.norm)
        return [t for t in (*found, *of_norm) if t is not None]


@pytest.fixture(scope="module")
def boundary() -> Iterator[Boundary]:
    with emulated(90) as emulator:
        yield Boundary(emulator, FracConfig(rate=4))


@pytest.fixture(scope="module")
def wide_boundary() -> Iterator[Boundary]:
    with emulated(90) as emulator:
        yield Boundary(emulator, HyperConfig(slots=4))


@pytest.fixture(scope="module")
def given() -> Iterator[Boundary]:
    with emulated(90) as emulator:
        yield Given(emulator, HyperConfig(slots=4))


BROKEN: list[Broken] = [
    ("forward", BARRIER, 2, left_out),
    ("forward", BARRIER, 4, left_out),
    ("forward", WAIT, 0, left_out),
    ("forward", COMMIT, 1, left_out),
    ("forward", PRODUCT, 0, swapped),
    ("forward", PRODUCT, 12, swapped),
    ("forward", PRODUCT, 42, swapped),
    ("forward", LOWER, 14, by_one_too_many),
    ("forward", LOWER, 9, by_one_too_many),
    ("forward", LOWER, 16, by_one_too_many),
    ("forward", TRANSPOSED, 0, not_transposed),
    ("forward", AS_IT_LIES, 0, transposed),
    ("forward", EXCHANGE, 5, with_another_lane),
    ("backward", BARRIER, 3, left_out),
    ("backward", BARRIER, 9, left_out),
    ("backward", BARRIER, 24, left_out),
    ("backward", WAIT, 0, left_out),
    ("backward", WAIT, 1, left_out),
    ("backward", COMMIT, 0, left_out),
    ("backward", PRODUCT, 0, swapped),
    ("backward", PRODUCT, 63, swapped),
    ("backward", PRODUCT, 99, swapped),
    ("backward", LOWER, 8, by_one_too_many),
    ("backward", LOWER, 13, by_one_too_many),
    ("backward", TRANSPOSED, 7, not_transposed),
    ("backward", AS_IT_LIES, 14, transposed),
    ("backward", EXCHANGE, 30, with_another_lane),
]


def named(broken: Broken) -> str:
    direction, pattern, n, change = broken
    return f"{direction}-{pattern.split(chr(92))[0].strip('(')}-{n}-{change.__name__}"


@pytest.mark.parametrize("broken", BROKEN, ids=named)
def test_a_broken_kernel_is_noticed(boundary: Boundary, broken: Broken) -> None:
    assert boundary.notices(*broken)


WIDE: list[Broken] = [
    ("forward", BARRIER, 1, left_out),
    ("forward", BARRIER, 6, left_out),
    ("forward", WAIT, 0, left_out),
    ("forward", COMMIT, 1, left_out),
    ("forward", PRODUCT, 12, swapped),
    ("forward", LOWER, 7, by_one_too_many),
    ("forward", AS_IT_LIES, 39, transposed),
    ("forward", EXCHANGE, 4, with_another_lane),
    ("backward", BARRIER, 4, left_out),
    ("backward", BARRIER, 30, left_out),
    ("backward", WAIT, 1, left_out),
    ("backward", COMMIT, 1, left_out),
    ("backward", PRODUCT, 0, swapped),
    ("backward", PRODUCT, 63, swapped),
    ("backward", LOWER, 12, by_one_too_many),
    ("backward", TRANSPOSED, 6, not_transposed),
    ("backward", AS_IT_LIES, 40, transposed),
    ("backward", EXCHANGE, 5, with_another_lane),
]


@pytest.mark.parametrize("broken", WIDE, ids=named)
def test_a_broken_kernel_of_wide_slots_is_noticed(wide_boundary: Boundary, broken: Broken) -> None:
    assert wide_boundary.notices(*broken)


GIVEN: list[Broken] = [
    ("forward", BARRIER, 1, left_out),
    ("forward", WAIT, 0, left_out),
    ("forward", PRODUCT, 5, swapped),
    ("forward", LOWER, 7, by_one_too_many),
    ("forward", EXCHANGE, 2, with_another_lane),
    ("backward", BARRIER, 4, left_out),
    ("backward", WAIT, 0, left_out),
    ("backward", COMMIT, 1, left_out),
    ("backward", PRODUCT, 9, swapped),
    ("backward", LOWER, 5, by_one_too_many),
    ("backward", LOWER, 10, by_one_too_many),
    ("backward", AS_IT_LIES, 20, transposed),
    ("backward", EXCHANGE, 5, with_another_lane),
]


@pytest.mark.parametrize("broken", GIVEN, ids=named)
def test_a_broken_kernel_of_given_coefficients_is_noticed(given: Boundary, broken: Broken) -> None:
    assert given.notices(*broken)


HARMLESS: list[Broken] = [
    ("forward", BARRIER, 0, left_out),  # another barrier stands between, as the watch for races confirms
    ("forward", WAIT, 1, left_out),  # the last one: nothing is under way that anybody reads
    ("backward", WAIT, 2, left_out),
    ("forward", LOWER, 0, by_one_too_many),  # one more round for a tile without rows, which stores nothing
]


@pytest.mark.parametrize("broken", HARMLESS, ids=named)
def test_what_is_not_needed_changes_nothing(boundary: Boundary, broken: Broken) -> None:
    """So that the others are noticed for what they break, not for having been changed."""
    assert not boundary.notices(*broken)
