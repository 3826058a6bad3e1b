"""Comparisons and choices."""

from laboratory.emulator.registry import FLOATS, PACKED, checked, integer, opcode
from laboratory.emulator.syntax import Instruction, Pair
from laboratory.emulator.writer import Writer

_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _compare(name: str, a: str, b: str, floating: bool) -> str:
    if name in ("num", "nan"):
        both = f"(({a} == {a}) & ({b} == {b}))"
        return both if name == "num" else f"~{both}"
    if floating and name in _UNORDERED:
        return f"~({_compare(_UNORDERED[name], a, b, True)})"
    if floating and name == "ne":
        return f"(({a} < {b}) | ({a} > {b}))"
    return f"({a} {_COMPARISONS[name]} {b})"


@opcode("setp")
@checked
def _setp(w: Writer, i: Instruction, parts: list[str]) -> None:
    """p|q are a comparison and its opposite, or of pairs of halves the comparisons of the lower and the upper."""
    kind, *rest = parts[-1], *parts[:-1]
    comparison, *combine = [part for part in rest if part != "ftz"]
    result, a, b, *other = i.operands
    first, second = (result.first, result.second) if isinstance(result, Pair) else (result, None)
    if kind in PACKED:
        x, y = (w.let(f"halves_{kind[:-2]}({w.use(operand, 'u32')})") for operand in (a, b))
        found, upper = (w.let(_compare(comparison, f"{x}[{n}]", f"{y}[{n}]", True)) for n in range(2))
    else:
        kind = kind if kind in FLOATS else integer(kind)
        x, y = w.use(a, kind), w.use(b, kind)
        if "ftz" in rest:
            x, y = (w.let(f"flush({name})") for name in (x, y))
        found = w.let(_compare(comparison, x, y, kind in FLOATS))
        upper = f"~{found}"
    sign = {"and": "&", "or": "|", "xor": "^"}[combine[0]] if combine else ""
    with_other = f" {sign} {w.use(other[0], 'p')}" if combine else ""
    w.set(first, "p", found + with_other)
    if second is not None:
        w.set(second, "p", upper + with_other)


@opcode("selp")
@checked
def _selp(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a, b, choice = i.operands
    bits = f"u{parts[-1].removeprefix('bf').lstrip('busf')}"
    w.set(result, bits, f"where({w.use(choice, 'p')}, {w.use(a, bits)}, {w.use(b, bits)})")
