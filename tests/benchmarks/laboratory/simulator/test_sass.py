"""The text of a compiled kernel, y = x * weight row by row: `scale.sass`, made for sm_90 by Triton 3.6."""

from pathlib import Path

import pytest

from laboratory.simulator.sass import FREE, Instruction, Loop, loops, parse

CODE, LABELS = parse(Path(__file__).with_name("scale.sass").read_text())


def at(address: int) -> Instruction:
    return CODE[address // 16]


def test_every_instruction_up_to_the_exit() -> None:
    assert len(CODE) == 49
    assert [i.base for i in CODE[:3]] == ["LDC", "S2R", "S2UR"]
    assert CODE[-1].op == "EXIT"
    assert at(0xA0).predicate == "@P0"
    assert at(0x2D0).arguments == "desc[UR4][R24.64], R16"


def test_control_codes() -> None:
    """Read by hand off the second words: stall, scoreboards set and waited for."""
    load = at(0x1C0)  # 0x000ee200...: 0x771 behind bit 41
    assert (load.stall, load.result, load.operands, load.wait) == (1, 3, FREE, 0)
    multiply = at(0x250)  # 0x028fe400...: waits for that load and for the weight's
    assert (multiply.stall, multiply.result, multiply.operands, multiply.wait) == (2, FREE, FREE, 0b101000)
    store = at(0x2D0)  # 0x0005e800...: 0x2f4, its operands' scoreboard is 2
    assert (store.stall, store.result, store.operands, store.wait) == (4, FREE, 2, 0)


def test_the_loop_over_rows() -> None:
    assert LABELS[".L_x_0"] == 0x130 // 16
    assert loops(CODE, LABELS) == [Loop(0x130 // 16, 0x2F0 // 16)]
    assert Loop(0, 9).holds(Loop(2, 5))
    assert not Loop(0, 9).holds(Loop(0, 9))


@pytest.mark.parametrize(
    ("op", "width"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.64", 8),
        ("STG.E", 4),
        ("STG.E.U16", 2),
        ("LDG.E.U8", 1),
        ("LDS.128", 16),
        ("LDSM.16.M88.4", 16),
        ("LDSM.16.MT88.2", 8),
        ("LDSM.16.M88", 4),
    ],
)
def test_bytes_of_a_lane(op: str, width: int) -> None:
    assert Instruction("", op, "", 1, FREE, FREE, 0).lane_bytes == width
