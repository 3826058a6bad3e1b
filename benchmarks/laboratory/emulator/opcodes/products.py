"""Products of matrices."""

from laboratory.emulator.registry import checked, opcode
from laboratory.emulator.syntax import Instruction, Vector
from laboratory.emulator.writer import Writer

_REGISTERS = {"m16n8k16": {"bf16": (4, 2), "f16": (4, 2)}, "m16n8k8": {"bf16": (2, 1), "f16": (2, 1), "tf32": (4, 2)}}
_REGISTERS |= {"m16n8k4": {"tf32": (2, 1)}}


@opcode("mma")
@checked
def _mma(w: Writer, i: Instruction, parts: list[str]) -> None:
    modes, shape, layouts, types = parts[:2], parts[2], parts[3:5], parts[5:]
    if modes != ["sync", "aligned"] or layouts != ["row", "col"] or len(types) != 4 or types[1] != types[2]:
        raise KeyError(i.opcode)
    kind = types[1]
    a_count, b_count = _REGISTERS[shape][kind]
    d, a, b, c = i.operands
    assert isinstance(d, Vector)
    assert isinstance(a, Vector)
    assert isinstance(b, Vector)
    assert isinstance(c, Vector)
    if (len(a.items), len(b.items)) != (a_count, b_count) or types[0] != types[3] or types[0] not in ("f32", "f16"):
        raise KeyError(i.opcode)
    w.whole_warps()
    left, right = _operand(w, "a", a, kind), _operand(w, "b", b, kind)
    if types[0] == "f32":
        names = tuple(w.use(item, "f32") for item in c.items)
        sums = w.rows.get(names) or f"fragments.rows({', '.join(names)})"
        found = w.let(f"fragments.multiply({left}, {right}, {sums}, {w.truncate})")
        for n, item in enumerate(d.items):
            w.set(item, "f32", f"{found}[{n}]")
        if w.active == "m":
            w.rows[tuple(w.use(item, "f32") for item in d.items)] = found
    else:
        sums = ", ".join(w.use(item, "u32") for item in c.items)
        halves = f"fragments.rows(*fragments.unpack_halves([{sums}]))"
        product = f"fragments.multiply({left}, {right}, {halves}, {w.truncate})"
        found = w.let(f"fragments.pack_halves({product})")
        for n, item in enumerate(d.items):
            w.set(item, "u32", f"{found}[{n}]")


def _operand(w: Writer, side: str, registers: Vector, kind: str) -> str:
    """Fragments as matrices; several products share them."""
    names = tuple(w.use(item, "u32") for item in registers.items)
    key = (side, kind, *names)
    if key not in w.products:
        w.products[key] = w.let(f"fragments.operand_{side}([{', '.join(names)}], {kind!r})")
    return w.products[key]
