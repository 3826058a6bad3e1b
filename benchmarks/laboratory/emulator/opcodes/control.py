"""Branches, barriers, and what is not emulated."""

from laboratory.emulator.registry import checked, opcode
from laboratory.emulator.syntax import Immediate, Instruction, Name
from laboratory.emulator.writer import Jump, Writer


@opcode("bra")
@checked
def _bra(w: Writer, i: Instruction, parts: list[str]) -> None:
    (target,) = i.operands
    assert isinstance(target, Name)
    w.jump = Jump("jump" if i.guard is None else "branch", w.kernel.labels[target.name], at=i.number)


@opcode("ret", "exit")
def _ret(w: Writer, i: Instruction, parts: list[str]) -> None:
    w.jump = Jump("jump" if i.guard is None else "branch", None, at=i.number)


@opcode("bar", "barrier")
@checked
def _bar(w: Writer, i: Instruction, parts: list[str]) -> None:
    if parts[0] == "warp":
        w.line(f"t.synchronise_warps({w.active})")
        return
    if [part for part in parts if part not in ("aligned", "cta")] != ["sync"] or i.guard is not None:
        w.unsupported("of barriers only an unguarded sync is emulated")
    numbers = [operand.value for operand in i.operands if isinstance(operand, Immediate)]
    if len(numbers) != len(i.operands):
        w.unsupported("the number of a barrier in a register")
    w.jump = Jump("barrier", barrier=(numbers[0], numbers[1] if len(numbers) > 1 else None), at=i.number)


@opcode("mbarrier", "wgmma", "tensormap", "tcgen05", "clusterlaunchcontrol", "mapa", "getctarank", "multimem")
def _not_emulated(w: Writer, i: Instruction, parts: list[str]) -> None:
    w.unsupported("mbarriers, TMA, clusters, wgmma and tensor memory are not emulated")


@opcode("call", "brx", "alloca", "tex", "suld", "sust", "wmma", "match")
def _not_known(w: Writer, i: Instruction, parts: list[str]) -> None:
    w.unsupported("not emulated")


@opcode("membar", "fence", "nanosleep", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "discard")
def _nothing(w: Writer, i: Instruction, parts: list[str]) -> None:
    """Orders, hints and waits that change no value here."""


@opcode("createpolicy")
@checked
def _createpolicy(w: Writer, i: Instruction, parts: list[str]) -> None:
    w.set(i.operands[0], "u64", w.constant(0, "u64"))


@opcode("trap")
def _trap(w: Writer, i: Instruction, parts: list[str]) -> None:
    w.line(f"t.trap({w.active}, {i.number})")
