"""Moves between registers and parts of them, and between address spaces."""

from laboratory.emulator.memory import LOCAL_WINDOW, SHARED_WINDOW
from laboratory.emulator.registry import checked, opcode
from laboratory.emulator.syntax import SIZES, Instruction, Operand, Register, Vector
from laboratory.emulator.writer import Writer


@opcode("mov")
@checked
def _mov(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, source = i.operands
    kind = parts[-1]
    if isinstance(result, Vector):
        _unpack(w, result, source, kind)
    elif isinstance(source, Vector):
        _pack(w, result, source, kind)
    elif isinstance(source, Register):
        w.alias(result, source)
    else:
        bits = "p" if kind == "pred" else f"u{SIZES[kind] * 8}"
        w.set(result, bits, w.use(source, bits))


def _unpack(w: Writer, result: Vector, source: Operand, kind: str) -> None:
    whole = SIZES[kind] * 8
    part = whole // len(result.items)
    word = w.use(source, f"u{whole}")
    if (whole, part) == (32, 16) and w.active == "m":
        for place, item in enumerate(result.items):
            if isinstance(item, Register):
                w.values[item] = {"half": f"{word}:{place}"}
                w.written.add(item)
        return
    for place, item in enumerate(result.items):
        shifted = f"({word} >> U{whole}({place * part}))" if place else word
        w.set(item, f"u{part}", f"{shifted}.astype(U{part})")


def _pack(w: Writer, result: Operand, source: Vector, kind: str) -> None:
    whole = SIZES[kind] * 8
    part = whole // len(source.items)
    if (whole, part) == (32, 16):
        low, high = (_half(w, item) for item in source.items)
        if low is not None and high is not None:
            if low[0] == high[0] and (low[1], high[1]) == ("0", "1"):
                w.set(result, "u32", low[0])
                return
            mask, half = w.constant(0xFFFF, "u32"), w.constant(16, "u32")
            below = f"({low[0]} & {mask})" if low[1] == "0" else f"({low[0]} >> {half})"
            upper = w.constant(0xFFFF0000, "u32")
            above = f"({high[0]} << {half})" if high[1] == "0" else f"({high[0]} & {upper})"
            w.set(result, "u32", f"{below} | {above}")
            return
    pieces = [f"{w.use(item, f'u{part}')}.astype(U{whole})" for item in source.items]
    shifted = [piece if not n else f"({piece} << U{whole}({n * part}))" for n, piece in enumerate(pieces)]
    w.set(result, f"u{whole}", " | ".join(shifted))


def _half(w: Writer, item: Operand) -> tuple[str, str] | None:
    """Of which 32-bit variable a 16-bit register is which half, if it is known to be one."""
    if isinstance(item, Register) and (found := w.values.get(item, {}).get("half")):
        word, place = found.split(":")
        return word, place
    return None


@opcode("cvta")
@checked
def _cvta(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a = i.operands
    to = parts[0] == "to"
    space = parts[1] if to else parts[0]
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    value = w.use(a, "u64")
    w.set(result, "u64", f"{value} {'-' if to else '+'} {w.constant(window, 'u64')}" if window else value)


@opcode("isspacep")
@checked
def _isspacep(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a = i.operands
    start = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(parts[0])
    value = w.use(a, "u64")
    inside = f"(({value} >> U64(40)) == U64({(start or 0) >> 40}))"
    w.set(result, "p", inside if start is not None else f"({value} >= U64({0x7F00_0000_0000}))")
