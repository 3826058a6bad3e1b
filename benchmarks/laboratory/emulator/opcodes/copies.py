"""Copies from global to shared memory that go on by themselves."""

from laboratory.emulator.registry import checked, opcode
from laboratory.emulator.syntax import Immediate, Instruction
from laboratory.emulator.writer import Writer


@opcode("cp")
@checked
def _cp(w: Writer, i: Instruction, parts: list[str]) -> None:
    if parts[:2] == ["async", "commit_group"]:
        w.line(f"t.commit_copies({w.active})")
    elif parts[:2] == ["async", "wait_group"]:
        (count,) = i.operands
        assert isinstance(count, Immediate)
        w.line(f"t.wait_for_copies({count.value}, {w.active})")
    elif parts[:2] == ["async", "wait_all"]:
        w.line(f"t.wait_for_copies(None, {w.active})")
    elif parts[0] == "async" and parts[1] in ("ca", "cg"):
        to, source, size, *more = i.operands
        assert isinstance(size, Immediate)
        cached = any("cache_hint" in part for part in parts)
        given = more[: len(more) - cached]
        there, there_offset = w.address(to, "u32")
        here, here_offset = w.address(source)
        bytes_given = w.use(given[0], "u32") if given else w.constant(size.value, "u32")
        w.touches("shared", size.value)
        w.touches("global", size.value)
        places = f"({there}, {there_offset}), ({here}, {here_offset})"
        w.line(f"t.copy_async({places}, {size.value}, {bytes_given}, {w.active}, {i.number})")
    else:
        w.unsupported("bulk and tensor copies (TMA) are not emulated")
