"""Loads, stores, atomics and matrices of shared memory."""

from laboratory.emulator.registry import INTEGERS, checked, integer, opcode
from laboratory.emulator.syntax import SIZES, Address, Instruction, Name, Vector
from laboratory.emulator.writer import Writer

_SPACES = ("global", "shared", "local", "param", "const")
_LOAD_MODIFIERS = {"ca", "cg", "cs", "cv", "lu", "cop", "nc", "wb", "wt", "volatile", "relaxed", "acquire", "release"}
_LOAD_MODIFIERS |= {"weak", "gpu", "cta", "sys", "cluster", "mmio"}


def _access(parts: list[str]) -> tuple[str, int, int, str]:
    """Space, bytes of an element, elements and type."""
    space, count, kind, rest = "generic", 1, parts[-1], []
    for part in parts[:-1]:
        name = part.partition("::")[0]
        if name in _SPACES:
            space = name
            if part == "shared::cluster":
                raise KeyError(part)
        elif part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif name not in {"L1", "L2", "level"}:
            rest.append(part)
    if set(rest) - _LOAD_MODIFIERS:
        raise KeyError(", ".join(set(rest) - _LOAD_MODIFIERS))
    return space, SIZES[kind], count, kind


@opcode("ld", "ldu")
@checked
def _ld(w: Writer, i: Instruction, parts: list[str]) -> None:
    space, size, count, kind = _access(parts)
    result, address = i.operands[:2]
    results = result.items if isinstance(result, Vector) else (result,)
    bits = f"{'s' if kind[0] == 's' else 'u'}{8 * size}"
    if space == "param":
        assert isinstance(address, Address)
        assert isinstance(address.base, Name)
        name = address.base.name
        start = next(p.offset for p in w.kernel.parameters if p.name == name) + address.offset
        for n, item in enumerate(results):
            w.wide_set(item, bits, f"t.parameter({start + n * size}, {size}).view({bits.upper()})")
        return
    base, offset = w.address(address, "u32" if space == "shared" else "u64")
    space = "global" if space == "const" else space
    w.touches(space, size)
    loaded = w.let(f"t.load_{space}({base}, {offset}, {size}, {count}, {w.active}, {i.number})")
    for n, item in enumerate(results):
        value = loaded if count == 1 else f"{loaded}[{n}]"
        w.wide_set(item, bits, f"{value}.view({bits.upper()})" if bits[0] == "s" else value)


@opcode("st")
@checked
def _st(w: Writer, i: Instruction, parts: list[str]) -> None:
    space, size, _, _ = _access(parts)
    address, value = i.operands[:2]
    items = value.items if isinstance(value, Vector) else (value,)
    base, offset = w.address(address, "u32" if space == "shared" else "u64")
    values = ", ".join(w.wide_use(item, f"u{8 * size}") for item in items)
    w.touches(space, size)
    w.line(f"t.store_{space}({base}, {offset}, {size}, [{values}], {w.active}, {i.number})")


@opcode("atom", "red")
@checked
def _atom(w: Writer, i: Instruction, parts: list[str]) -> None:
    space, operation, kind, rest = "generic", "", parts[-1], []
    for part in parts[:-1]:
        name = part.partition("::")[0]
        if name in ("global", "shared"):
            space = name
        elif part in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"):
            operation = part
        elif name not in _LOAD_MODIFIERS | {"acq_rel", "noftz", "L2", "L1"}:
            rest.append(part)
    if rest or not operation:
        raise KeyError(", ".join(rest))
    returns = i.parts[0] == "atom"
    address, *values = i.operands[1:] if returns else i.operands
    base, offset = w.address(address, "u32" if space == "shared" else "u64")
    kind = integer(kind) if kind in INTEGERS else kind
    bits = f"u{SIZES[kind] * 8}"
    w.touches(space, SIZES[kind])
    operands = ", ".join(w.use(value, bits) for value in values[: 2 if operation == "cas" else 1])
    call = f"t.atomic({space!r}, {operation!r}, {kind!r}, {base}, {offset}, ({operands},), {w.active}, {i.number})"
    if returns:
        w.set(i.operands[0], bits, call)
    else:
        w.line(call)


@opcode("ldmatrix", "stmatrix")
@checked
def _matrix(w: Writer, i: Instruction, parts: list[str]) -> None:
    shape = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if set(parts) - shape:
        raise KeyError(", ".join(set(parts) - shape))
    load, transposed = i.parts[0] == "ldmatrix", "trans" in parts
    registers, address = i.operands if load else reversed(i.operands)
    items = registers.items if isinstance(registers, Vector) else (registers,)
    base, offset = w.address(address, "u32")
    w.whole_warps()
    w.touches("shared", 16)
    if load:
        arguments = f"{base}, {offset}, {len(items)}, {transposed}, {w.active}, {i.number}"
        loaded = w.let(f"t.load_matrix({arguments})")
        for n, item in enumerate(items):
            w.set(item, "u32", f"{loaded}[{n}]")
    else:
        values = ", ".join(w.use(item, "u32") for item in items)
        w.line(f"t.store_matrix({base}, {offset}, [{values}], {transposed}, {w.active}, {i.number})")
