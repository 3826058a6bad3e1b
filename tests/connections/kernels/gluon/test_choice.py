"""Which kernels run, main or general, and that it is said."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from compiled import SHARED_MEMORY, SLOTS, WIDTHS, launched_as, read_table, shapes
from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import cuts, launch
from megatron_fc.connections.kernels.gluon import choice
from support import kernel_cases, kernel_reference

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unsaid() -> Iterator[None]:
    """What was said before may be said again."""
    for said in (choice._chosen, choice._chosen_for_depth):
        said.cache_clear()
    yield
    for said in (choice._chosen, choice._chosen_for_depth):
        said.cache_clear()


def make(width: int = 1024, dtype: torch.dtype = BF16, kind: str | None = "rmsnorm", **config: Any) -> Any:
    return kernel_reference.make(FracConfig(**{"rate": 4} | config), width, 4, dtype, kind)


def chosen(case: kernel_reference.Case, **changes: Any) -> tuple[choice.Main | None, choice.Main | None]:
    """For the boundary, forward and backward."""
    depth = launch.DepthInputs(case.o, case.h, *case.coefficients)._replace(**changes.pop("depth", {}))
    given = {"x": case.h, "g_x": case.g_x, "g_mixed": case.g_mixed, "g_beta": case.g_beta} | changes
    site = cuts.site_of(cuts.WIDTH, case.h, case.config.slots, case.config.fractions, case.operands, case.norm)
    forward = choice.main_forward(site, case.h, given["x"], depth, case.operands, case.norm)
    incoming = (given["g_x"], given["g_mixed"], given["g_beta"])
    return forward, choice.main_backward(site, case.h, incoming, depth, case.operands, case.norm)


def test_the_main_kernels_run_and_say_so_once(emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_fc")
    for _ in range(2):
        assert None not in chosen(make())
    assert caplog.messages == [
        f"Boundaries of d = 1024, m = 4, n = 4 run {direction} on the main kernel"
        for direction in ("forward", "backward")
    ]


OBSTACLES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("the main one does not do 1 slots with 1 fractions", {"rate": 1}, {}),
    ("the main one does not do static coefficients", {"dynamic": False}, {}),
    ("the main one does not do layer norms", {"norm": "layernorm"}, {}),
    ("the main one does not do layer norms", {"kind": "layernorm"}, {}),
    ("the main one does not do 16 columns of a fraction", {"width": 64}, {}),
    ("the main one does not do streams in torch.float32", {"dtype": torch.float32}, {}),
    ("the main one does not do absent inputs or gradients", {}, {"x": None, "g_mixed": None}),
    ("the main one does not do bias or dropout of an output", {}, {"depth": {"bias": torch.ones(1024, dtype=BF16)}}),
    ("the main one does not do tensors off 16-byte boundaries", {}, {"depth": {"o": torch.ones(4097, dtype=BF16)[1:]}}),
    ("the main one does not do parameters or coefficients that are not in fp32", {},
     {"depth": {"beta": torch.ones(4, 4, dtype=torch.float64)}}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "case", "changes"), OBSTACLES)
def test_what_the_main_kernels_do_not_do_is_said(
    emulator: Emulator, caplog: pytest.LogCaptureFixture, reason: str, case: dict[str, Any], changes: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, "megatron_fc")
    assert chosen(make(**case), **changes) == (None, None)
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert message.endswith(f"on the general kernel: {reason}")


def test_another_triton_is_a_warning(
    emulator: Emulator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.triton, "__version__", "3.7.1")
    assert chosen(make()) == (None, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.messages[0].endswith(
        "run forward on the general kernel: the main one was verified with Triton 3.6.*, not with 3.7.1"
    )


@pytest.mark.parametrize(("change", "sentence"), [
    ({"arch": 75}, "the main one is for sm_80 and later, cpu is cuda 75"),
    ({"room": 48 * 1024}, "1024 columns of a fraction do not fit into shared memory"),
])  # fmt: skip
def test_a_gpu_that_cannot_run_them(
    change: dict[str, int], sentence: str, emulator: Emulator, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "megatron_fc")
    emulator.arch = change.get("arch", 90)
    room = change.get("room", 227 * 1024)
    monkeypatch.setattr(emulator.utils, "get_device_properties", lambda device: {"max_shared_mem": room})
    choice._room.cache_clear()
    assert chosen(make(4096)) == (None, None)
    assert all(message.endswith(sentence) for message in caplog.messages)
    choice._room.cache_clear()


def test_both_kinds_of_kernels_agree(emulator: Emulator, general_kernels: pytest.MonkeyPatch) -> None:
    """Values of a boundary and launches: one forward, two backward."""
    case = make()
    narrow = case.p.dynamic_weight / 4  # which leaves tanh its slope
    case = replace(case, p=case.p._replace(dynamic_weight=narrow))
    depth, site = kernel_cases.depth_inputs(case, dropout=False), (case.operands, case.norm)

    def results() -> dict[str, torch.Tensor]:
        h, *after = launch.boundary_forward(depth, *site)
        g_h, gradients, g_o, g_beta = launch.boundary_backward(case.g_x, case.g_beta, case.g_mixed, h, depth, *site)
        return {"h": h, "g_o": g_o, "g_beta": g_beta, **kernel_cases._named(after, g_h, gradients)}

    general = results()
    general_kernels.undo()
    main = results()
    for name, value in general.items():
        assert kernel_reference.error(main[name], value.double()) < kernel_cases.HALF[BF16], name
    assert [name for name, _ in emulator.launches] == [
        "width_forward_kernel", "width_backward_kernel", "reduce_kernel",
        "main_forward_kernel", "main_backward_kernel", "reduce_kernel",
    ]  # fmt: skip


def test_registers_and_shared_memory_are_as_compiled() -> None:
    """By the recorded table: as many programs run on a processor as were counted on."""
    table = read_table(90)
    names = ("width forward", "width backward", "boundary forward", "boundary backward")
    main = 0
    for shape in shapes(names, WIDTHS, None, None) + shapes(names, WIDTHS[:1], None, SLOTS):
        found = launched_as(shape, 90)
        if found.kernel.is_gluon():
            compiled = table[shape]
            assert compiled.registers <= found.cut.registers
            assert found.cut.programs * (compiled.shared + 1024) <= SHARED_MEMORY[90] + 1024
            main += 1
    assert main >= 28


def test_a_depth_connection_says_what_runs(emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_fc")
    case = kernel_reference.make(HyperConfig(slots=4), 1024, 4, BF16, None)
    for _ in range(2):
        launch.depth_forward(launch.DepthInputs(case.o, case.h, *case.coefficients))
    assert caplog.messages == ["Depth connections of d = 1024, m = 1, n = 4 run forward on the main kernel"]
