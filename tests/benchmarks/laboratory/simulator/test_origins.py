"""Pointers that accesses follow: in a compiled kernel, and in lines made for what it lacks."""

from pathlib import Path

import pytest

from laboratory.simulator.origins import origin, pointer_offsets
from laboratory.simulator.sass import FREE, Instruction, parse

POINTERS = {0x210: "x", 0x218: "y", 0x220: "weight"}
CODE, _ = parse(Path(__file__).with_name("scale.sass").read_text())
PTX = """.visible .entry scale(
\t.param .u64 .ptr .global .align 1 scale_param_0,
\t.param .u32 scale_param_1,
\t.param .u64 .ptr .global .align 1 scale_param_2
)
{
"""


def lines(*texts: str) -> list[Instruction]:
    """Instructions from `@P0 MOV R1, R2`."""
    made = []
    for text in texts:
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        op, _, arguments = rest.partition(" ")
        made.append(Instruction(predicate, op, arguments, 1, FREE, FREE, 0))
    return made


def test_of_a_compiled_kernel() -> None:
    found = [(i.op, origin(CODE, k, POINTERS)) for k, i in enumerate(CODE) if i.is_global]
    assert found == [("LDG.E.128", "weight")] * 2 + [("LDG.E.128", "x")] * 2 + [("STG.E.128", "y")] * 2


def test_offsets_are_aligned_as_parameters_are() -> None:
    assert pointer_offsets(PTX, ["x", "count", "y"]) == {0x210: "x", 0x220: "y"}


def test_the_second_half_of_a_pair_and_of_a_wide_load() -> None:
    code = lines("LDC.64 R2, c[0x0][0x218]", "MOV R4, R3", "LDG.E R5, desc[UR4][R4.64]")
    assert origin(code, 2, POINTERS | {0x21C: "upper"}) == "upper"


def test_a_predicated_definition_does_not_hide_the_earlier_one() -> None:
    code = lines("MOV R2, c[0x0][0x218]", "@P0 MOV R2, RZ", "LDG.E R5, desc[UR4][R2.64]")
    assert origin(code, 2, POINTERS) == "y"
    hidden = lines("MOV R2, c[0x0][0x218]", "MOV R2, c[0x0][0x220]", "LDG.E R5, desc[UR4][R2.64]")
    assert origin(hidden, 2, POINTERS) == "weight"


def test_through_the_stack() -> None:
    code = lines("MOV R2, c[0x0][0x218]", "STL [R1+0x8], R2", "LDL R7, [R1+0x8]", "STG.E desc[UR4][R7.64], R0")
    assert origin(code, 3, POINTERS) == "y"


def test_around_a_loop() -> None:
    """The address is moved on at the end of the round before."""
    code = lines("MOV R2, c[0x0][0x210]", "LDG.E R5, desc[UR4][R2.64]", "IADD3 R2, R2, 0x10, RZ", "BRA `(.L_x_0)")
    assert origin(code, 1, POINTERS) == "x"


def test_loaded_values_are_no_pointers_of_the_kernel() -> None:
    code = lines("MOV R2, c[0x0][0x210]", "LDG.E.64 R4, desc[UR4][R2.64]", "LDG.E R6, desc[UR4][R4.64]")
    with pytest.raises(LookupError, match=r"LDG\.E R6"):
        origin(code, 2, POINTERS)
