"""Exchange between the lanes of a warp."""

from laboratory.emulator.registry import checked, integer, opcode
from laboratory.emulator.syntax import Immediate, Instruction, Pair, Register
from laboratory.emulator.writer import Writer


@opcode("shfl")
@checked
def _shfl(w: Writer, i: Instruction, parts: list[str]) -> None:
    _, mode, _ = parts
    result, a, distance, bounds, members = i.operands
    if isinstance(members, Immediate):
        w.whole_warps()
    if isinstance(distance, Immediate) and isinstance(bounds, Immediate):
        found = w.let(f"t.shuffle_constant({mode!r}, {distance.value & 31}, {bounds.value})")
    else:
        found = w.let(f"t.shuffle_from({mode!r}, {w.use(distance, 'u32')}, {w.use(bounds, 'u32')})")
    first, inside = (result.first, result.second) if isinstance(result, Pair) else (result, None)
    kind = "f32" if isinstance(a, Register) and "f32" in w.values.get(a, {}) else "u32"
    w.set(first, kind, f"{w.use(a, kind)}[{found}[0]]")
    if inside is not None:
        w.set(inside, "p", f"{found}[1]")


@opcode("vote")
@checked
def _vote(w: Writer, i: Instruction, parts: list[str]) -> None:
    mode = parts[1]
    result, a, _ = i.operands
    value = w.use(a, "p")
    if mode == "ballot":
        w.set(result, "u32", f"t.ballot({value}, {w.active})")
    else:
        w.set(result, "p", f"t.vote({mode!r}, {value}, {w.active})")


@opcode("activemask")
@checked
def _activemask(w: Writer, i: Instruction, parts: list[str]) -> None:
    w.set(i.operands[0], "u32", f"t.ballot({w.constant(1, 'p')}, {w.active})")


@opcode("redux")
@checked
def _redux(w: Writer, i: Instruction, parts: list[str]) -> None:
    _, operation, kind = parts
    result, a, members = i.operands
    kind = integer(kind)
    w.set(result, kind, f"t.reduce({operation!r}, {w.use(a, kind)}, {w.use(members, 'u32')})")


@opcode("elect")
@checked
def _elect(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, members = i.operands
    assert isinstance(result, Pair)
    mask = w.use(members, "u32")
    w.set(result.first, "u32", f"np.bitwise_count(({mask} & (~{mask} + U32(1))) - U32(1)).astype(U32)")
    w.set(result.second, "p", f"t.elected({mask})")
