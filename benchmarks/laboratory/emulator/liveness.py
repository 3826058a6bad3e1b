"""Registers that a later block reads: what a block has to write back."""

from laboratory.emulator.syntax import (
    Address,
    Block,
    Instruction,
    Kernel,
    Name,
    Negated,
    Operand,
    Pair,
    Register,
    Vector,
)


def live_after(kernel: Kernel) -> list[set[Register]]:
    """Of each block, the registers that something after it reads."""
    reads: list[set[Register]] = []
    writes: list[set[Register]] = []
    after: list[set[int]] = []
    for block in kernel.blocks:
        read: set[Register] = set()
        written: set[Register] = set()
        for instruction in block.instructions:
            sources, results = _registers(instruction)
            read |= sources - written
            if instruction.guard is None:
                written |= results
            else:
                read |= results - written
        reads.append(read)
        writes.append(written)
        after.append(_successors(kernel, block))
    live: list[set[Register]] = [set() for _ in kernel.blocks]
    changed = True
    while changed:
        changed = False
        for index in reversed(range(len(live))):
            out = {r for n in after[index] if n < len(live) for r in reads[n] | (live[n] - writes[n])}
            if out != live[index]:
                live[index], changed = out, True
    return live


def _successors(kernel: Kernel, block: Block) -> set[int]:
    last = block.instructions[-1]
    kind, following = last.parts[0], {block.index + 1}
    if kind in ("ret", "exit"):
        return following if last.guard is not None else set()
    if kind == "bra":
        target = last.operands[0]
        assert isinstance(target, Name)
        return {kernel.labels[target.name]} | (following if last.guard is not None else set())
    return following


_NO_RESULT = {"st", "bra", "ret", "exit", "bar", "barrier", "red", "stmatrix", "cp", "membar", "fence", "trap"}
_NO_RESULT |= {"nanosleep", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "discard", "applypriority"}


def _registers(instruction: Instruction) -> tuple[set[Register], set[Register]]:
    """Registers that an instruction reads and that it writes."""

    def of(operand: Operand) -> set[Register]:
        match operand:
            case Register():
                return {operand}
            case Vector(items):
                return {register for item in items for register in of(item)}
            case Address(Register() as base, _):
                return {base}
            case Negated(inner):
                return of(inner)
            case Pair(first, second):
                return of(first) | of(second)
        return set()

    results = 0 if instruction.parts[0] in _NO_RESULT else 1
    written = {register for operand in instruction.operands[:results] for register in of(operand)}
    read = {register for operand in instruction.operands[results:] for register in of(operand)}
    if instruction.guard is not None:
        read.add(instruction.guard)
    return read, written
