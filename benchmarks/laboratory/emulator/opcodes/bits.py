"""Logic, shifts, bit fields and bytes."""

from laboratory.emulator.registry import checked, integer, opcode, split
from laboratory.emulator.syntax import Immediate, Instruction
from laboratory.emulator.writer import Writer


@opcode("and", "or", "xor")
@checked
def _bitwise(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a, b = i.operands
    kind = "p" if parts[-1] == "pred" else integer(parts[-1])
    sign = {"and": "&", "or": "|", "xor": "^"}[i.parts[0]]
    w.set(result, kind, f"{w.use(a, kind)} {sign} {w.use(b, kind)}")


@opcode("not", "cnot")
@checked
def _not(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a = i.operands
    kind = "p" if parts[-1] == "pred" else integer(parts[-1])
    zero = f"({w.use(a, kind)} == 0).astype({kind.upper()})"
    w.set(result, kind, f"~{w.use(a, kind)}" if i.parts[0] == "not" else zero)


@opcode("shl", "shr")
@checked
def _shift(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a, count = i.operands
    kind = integer(parts[-1])
    if isinstance(count, Immediate):
        by = w.constant(min(count.value, 255), kind)
    else:
        by = w.use(count, "u32")
        by = by if kind == "u32" else w.let(f"np.minimum({by}, U32(255)).astype({kind.upper()})")
    w.set(result, kind, f"{w.use(a, kind)} {'<<' if i.parts[0] == 'shl' else '>>'} {by}")


@opcode("bfe")
@checked
def _bfe(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a, start, length = i.operands
    kind = parts[-1]
    bits = int(kind[1:])
    if isinstance(start, Immediate) and isinstance(length, Immediate) and 0 < length.value <= bits - start.value:
        up, value = bits - start.value - length.value, w.use(a, kind)
        if kind[0] == "u":
            shifted = f"({value} >> {w.constant(start.value, kind)})" if start.value else value
            w.set(result, kind, f"{shifted} & {w.constant((1 << length.value) - 1, kind)}" if up else shifted)
        else:
            w.set(result, kind, f"({value} << {w.constant(up, kind)}) >> {w.constant(bits - length.value, kind)}")
        return
    w.set(result, kind, f"extract_bits({w.use(a, kind)}, {w.use(start, 'u32')}, {w.use(length, 'u32')})")


@opcode("bfi")
@checked
def _bfi(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a, b, start, length = i.operands
    kind = integer(parts[-1])
    arguments = [w.use(a, kind), w.use(b, kind), w.use(start, "u32"), w.use(length, "u32")]
    w.set(result, kind, f"insert_bits({', '.join(arguments)})")


@opcode("prmt")
@checked
def _prmt(w: Writer, i: Instruction, parts: list[str]) -> None:
    split(parts, set())
    result, a, b, selector = i.operands
    if isinstance(selector, Immediate) and selector.value & 0xFFFF in (0x5410, 0x7632):
        x, y, half = w.use(a, "u32"), w.use(b, "u32"), w.constant(16, "u32")
        if selector.value & 0xFFFF == 0x5410:
            w.set(result, "u32", f"({x} & {w.constant(0xFFFF, 'u32')}) | ({y} << {half})")
        else:
            w.set(result, "u32", f"({x} >> {half}) | ({y} & {w.constant(0xFFFF0000, 'u32')})")
        return
    w.set(result, "u32", f"permute_bytes({', '.join(w.use(operand, 'u32') for operand in (a, b, selector))})")


@opcode("lop3")
@checked
def _lop3(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a, b, c, table = i.operands
    assert isinstance(table, Immediate)
    w.set(result, "u32", f"logic3({', '.join(w.use(operand, 'u32') for operand in (a, b, c))}, {table.value})")


@opcode("shf")
@checked
def _shf(w: Writer, i: Instruction, parts: list[str]) -> None:
    side, mode, _ = parts
    result, low, high, count = i.operands
    arguments = ", ".join(w.use(operand, "u32") for operand in (low, high, count))
    w.set(result, "u32", f"funnel({arguments}, {side == 'l'}, {mode == 'clamp'})")


@opcode("popc", "clz", "brev")
@checked
def _count(w: Writer, i: Instruction, parts: list[str]) -> None:
    result, a = i.operands
    value = w.use(a, integer(parts[-1]))
    forms = {"popc": "np.bitwise_count({}).astype(U32)", "clz": "leading_zeros({})", "brev": "reverse_bits({})"}
    kind = integer(parts[-1]) if i.parts[0] == "brev" else "u32"
    w.set(result, kind, forms[i.parts[0]].format(value))
