"""The function of one basic block, written instruction by instruction.

A block becomes `def block_7(r, t, m)`: r are the registers, t the threads (`machine.Machine`), m says which of them are
here, None for all. Within a block a register is a local variable for each kind that instructions take it for (u32, f32,
...); only what a later block reads goes back into r. Threads that are not in m compute, too, and what they compute is
thrown away at the block's end; only accesses to memory and guarded instructions need a mask.
"""

from dataclasses import dataclass

import numpy as np

from laboratory.emulator.arith import KINDS
from laboratory.emulator.errors import Unsupported
from laboratory.emulator.memory import SHARED
from laboratory.emulator.registry import FLOATS, Handler
from laboratory.emulator.special import SPECIAL
from laboratory.emulator.syntax import Address, Block, Immediate, Instruction, Kernel, Name, Negated, Operand, Register

_BITS = {"b16": 16, "b32": 32, "b64": 64}


@dataclass(frozen=True)
class Jump:
    """The end of a block: target is where a branch goes, None for the end of the kernel."""

    kind: str  # next, jump, branch, barrier
    target: int | None = None
    barrier: tuple[int, int | None] = (0, None)  # its number, and how many threads it waits for if not all
    at: int = 0


class Writer:
    """The writer of one block's function.

    Args:
        live: registers that a later block reads.
        handlers: what writes an instruction, by opcode.
        truncate: matrix products round toward zero rather than to nearest.
        cells: bytes of the smallest access by space, which become smaller where the block has a smaller one.
    """

    def __init__(
        self,
        kernel: Kernel,
        block: Block,
        live: set[Register],
        handlers: dict[str, Handler],
        truncate: bool,
        cells: dict[str, int],
    ) -> None:
        self.kernel, self.block, self.live = kernel, block, live
        self.handlers, self.truncate, self.cells = handlers, truncate, cells
        self.lines: list[str] = []
        self.values: dict[Register, dict[str, str]] = {}  # the local variables of each register by kind
        self.written: set[Register] = set()
        self.constants: dict[tuple[str, int], str] = {}
        self.products: dict[tuple[str, ...], str] = {}  # operands of matrix products, unpacked
        self.rows: dict[tuple[str, ...], str] = {}  # variables that are the rows of one
        self.count = 0
        self.jump = Jump("next")
        self.instruction = block.instructions[0]
        self.active = "m"  # the mask of the current instruction

    def source(self) -> str:
        for instruction in self.block.instructions:
            self._one(instruction)
        condition = None
        last = self.block.instructions[-1]
        if self.jump.kind == "branch":
            assert last.guard is not None
            condition = ("~" if last.negated else "") + self.use(last.guard, "p")
        self._write_back()
        self.lines.append(f"return {condition}")
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"def block_{self.block.index}(r, t, m):\n    k = t.k\n{body}\n"

    def _one(self, instruction: Instruction) -> None:
        self.instruction = instruction
        kind, *parts = instruction.parts
        handler = self.handlers.get(kind)
        if handler is None:
            self.unsupported("no such opcode here")
        assert handler is not None
        self.active = "m"
        if instruction.guard is not None and not instruction.ends_block:
            guard = ("~" if instruction.negated else "") + self.use(instruction.guard, "p")
            self.active = self.let(f"t.both(m, {guard})")
        handler(self, instruction, parts)

    def unsupported(self, why: str) -> None:
        raise Unsupported(f"{self.instruction}: {why}")

    def _write_back(self) -> None:
        back = sorted(self.written & self.live, key=lambda register: register.index)
        if not back:
            return
        pairs = []
        for register in back:
            kind = "p" if register.kind == "p" else f"u{_BITS[register.kind]}"
            name = next((self.values[register][k] for k in self._same_size(register)), None)
            pairs.append((register.index, name or self.use(register, kind), kind))
        self.lines.append("if m is None:")
        self.lines += [f"    r[{index}] = {name}" for index, name, _ in pairs]
        self.lines.append("else:")
        for index, name, kind in pairs:
            view = "" if kind == "p" else f".view({kind.upper()})"
            self.lines.append(f"    r[{index}] = where(m, {name}{view}, r[{index}]{view})")

    def _same_size(self, register: Register) -> list[str]:
        """Kinds in which the register is at hand with all its bits."""
        kinds = ["p"] if register.kind == "p" else [f"{c}{_BITS[register.kind]}" for c in "usf"]
        return [kind for kind in kinds if kind in self.values[register]]

    # Values.

    def line(self, text: str) -> None:
        self.lines.append(text)

    def new(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def let(self, expression: str) -> str:
        name = self.new()
        self.lines.append(f"{name} = {expression}")
        return name

    def constant(self, bits: int, kind: str) -> str:
        """The same bits in every thread."""
        width = 1 if kind == "p" else 8 * np.dtype(KINDS[kind]).itemsize
        bits = int(bool(bits)) if kind == "p" else bits & (1 << width) - 1
        if (kind, bits) not in self.constants:
            self.constants[kind, bits] = self.let(f"k[{kind!r}][{bits}]")
        return self.constants[kind, bits]

    def use(self, operand: Operand, kind: str) -> str:
        """A variable with an operand's value: u32, s64, f32, ... as bits of that size, p, or bf16 widened to fp32."""
        match operand:
            case Register():
                return self._use_register(operand, kind)
            case Negated(inner):
                return self.let(f"~{self.use(inner, kind)}")
            case Immediate(value, float_bits):
                if kind == "bf16":
                    return self.let(f"widen({self.constant(value, 'u16')})")
                if kind in ("f32", "f16") and float_bits == 64:
                    number = np.array(value, np.uint64).view(np.float64).astype(KINDS[kind])
                    return self.constant(int(number.view(f"u{number.itemsize}")), kind)
                return self.constant(value, kind)
            case Name(name) if name.startswith("%"):
                if name[1:].partition(".")[0] not in SPECIAL:
                    self.unsupported(f"no register {name}")
                return self.cast(self.let(f"t.special({name!r})"), kind)
            case Name(name):
                return self.symbol(name, kind)
        self.unsupported(f"operand {operand} as {kind}")
        raise AssertionError

    def symbol(self, name: str, kind: str) -> str:
        """The address of a declared array, in its own space."""
        array = self.kernel.arrays.get(name)
        if array is None:
            self.unsupported(f"no array {name}")
        assert array is not None
        if array.space in ("global", "const"):
            return self.cast(self.let(f"t.symbol({name!r})"), kind)
        return self.constant(array.offset + (SHARED if array.space == "shared" else 0), kind)

    def cast(self, name: str, kind: str) -> str:
        """An unsigned value with another number of bits."""
        return self.let(f"{name}.astype({('u' + kind[1:]).upper()}).view({kind.upper()})")

    def _use_register(self, register: Register, kind: str) -> str:
        have = self.values.setdefault(register, {})
        if kind in have:
            return have[kind]
        if (kind == "p") != (register.kind == "p"):
            self.unsupported(f"{register.name} as {kind}")
        if kind == "bf16":
            if "half" in have:
                word, place = have["half"].split(":")
                shifted = f"{word} << U32(16)" if place == "0" else f"{word} & U32(0xFFFF0000)"
                have[kind] = self.let(f"({shifted}).view(F32)")
            else:
                have[kind] = self.let(f"widen({self.use(register, 'u16')})")
            return have[kind]
        if register.kind != "p" and np.dtype(KINDS[kind]).itemsize * 8 != _BITS[register.kind]:
            self.unsupported(f"{register.name} as {kind}")
        if "half" in have and not self._same_size(register):
            word, place = have["half"].split(":")
            have["u16"] = self.let(f"({word} >> U32(16)).astype(U16)" if place == "1" else f"{word}.astype(U16)")
            if kind == "u16":
                return have[kind]
        same = self._same_size(register)
        value = have[same[0]] if same else f"r[{register.index}]"
        have[kind] = self.let(value if kind == "p" else f"{value}.view({kind.upper()})")
        return have[kind]

    def set(self, operand: Operand, kind: str, expression: str) -> None:
        """Make an operand's value an expression, of the same kinds as in `use`."""
        if operand == Name("_"):
            return
        if not isinstance(operand, Register):
            self.unsupported(f"a result in {operand}")
        assert isinstance(operand, Register)
        if kind == "bf16":
            kind, expression = "u16", f"narrow({expression})"
        bits = 1 if kind == "p" else np.dtype(KINDS[kind]).itemsize * 8
        if bits != (1 if operand.kind == "p" else _BITS[operand.kind]):
            self.unsupported(f"{operand.name} as {kind}")
        if self.active != "m":
            old = self.use(operand, kind)
            name = self.let(expression)
            expression = f"{name} if {self.active} is None else where({self.active}, {name}, {old})"
        self.values[operand] = {kind: self.let(expression)}
        self.written.add(operand)

    def alias(self, to: Operand, source: Register) -> None:
        """Another name for a register's value."""
        if self.active != "m" or not isinstance(to, Register):
            kind = "p" if source.kind == "p" else f"u{_BITS[source.kind]}"
            self.set(to, kind, self.use(source, kind))
            return
        have = self.values.setdefault(source, {})
        if not have:
            self.use(source, "p" if source.kind == "p" else f"u{_BITS[source.kind]}")
        self.values[to] = dict(have)
        self.written.add(to)

    def wide_use(self, operand: Operand, kind: str) -> str:
        """As `use`, of the low bits of a register that may be larger."""
        if not isinstance(operand, Register) or (kind in FLOATS and kind != "bf16"):
            return self.use(operand, kind)
        bits = _BITS[operand.kind]
        if kind == "bf16" or np.dtype(KINDS[kind]).itemsize * 8 == bits:
            return self.use(operand, kind)
        return self.let(f"{self.use(operand, f'u{bits}')}.astype({('u' + kind[1:]).upper()}).view({kind.upper()})")

    def wide_set(self, operand: Operand, kind: str, expression: str) -> None:
        """As `set`, into a register that may be larger, where an integer is extended."""
        if isinstance(operand, Register) and kind in KINDS:
            bits = _BITS[operand.kind]
            if np.dtype(KINDS[kind]).itemsize * 8 < bits:
                extended = f"{kind[0] if kind[0] == 's' else 'u'}{bits}"
                self.set(operand, extended, f"({expression}).astype({extended.upper()})")
                return
        self.set(operand, kind, expression)

    def whole_warps(self) -> None:
        """Check that of each warp that is here all lanes are."""
        self.line(f"if {self.active} is not None: t.whole_warps({self.active}, {self.instruction.number})")

    def touches(self, space: str, size: int) -> None:
        for name in ("shared", "global") if space == "generic" else (space,):
            if name in self.cells:
                self.cells[name] = min(self.cells[name], size)

    def address(self, operand: Operand, kind: str = "u64") -> tuple[str, int]:
        """A variable and an offset."""
        if not isinstance(operand, Address):
            self.unsupported(f"{operand} is no address")
        assert isinstance(operand, Address)
        if operand.base is None:
            return self.constant(0, kind), operand.offset
        if isinstance(operand.base, Register):
            return self.use(operand.base, f"u{_BITS[operand.base.kind]}"), operand.offset
        return self.symbol(operand.base.name, kind), operand.offset
