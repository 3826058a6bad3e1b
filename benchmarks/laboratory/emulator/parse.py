"""PTX text to kernels: parameters, memory, and instructions in basic blocks."""

import re
import struct
from collections.abc import Iterator

from laboratory.emulator.errors import PTXError, Unsupported
from laboratory.emulator.syntax import (
    SIZES,
    Address,
    Array,
    Block,
    Immediate,
    Instruction,
    Kernel,
    Name,
    Negated,
    Operand,
    Pair,
    Parameter,
    Register,
    Vector,
)

# Register classes, by the type in `.reg`: what a register holds is bits, and instructions say what they stand for.
_CLASS = {"pred": "p", "b8": "b16", "f16x2": "b32", "bf16x2": "b32", "f16": "b16", "bf16": "b16"}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*([^{]*)\{")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?\s*$", re.S)
_ARRAY = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)?\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*"
    r"(?:\[(\d*)\])?\s*(?:=\s*(\{[^}]*\}|[^;]+?))?\s*;"
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)[^\n]*?(?://\s*([^\n]*?))?\s*(?=\n)")
_LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)\s*([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel of this name, or the only one."""
    entries = [match for match in _ENTRY.finditer(text) if name is None or match[1] == name]
    if len(entries) != 1:
        names = [match[1] for match in _ENTRY.finditer(text)]
        raise PTXError(f"expected one kernel{f' {name}' if name else ''}, the text has {names}")
    return _Parser(text, entries[0]).kernel()


class _Parser:
    def __init__(self, text: str, entry: re.Match[str]) -> None:
        self.text, self.entry = text, entry
        self.registers: list[Register] = []
        self.scopes: list[dict[str, Register]] = [{}]
        self.arrays: dict[str, Array] = {}
        self.used = {"shared": 0, "local": 0}
        self.instructions: list[Instruction] = []
        self.marks: list[tuple[str, int]] = []  # labels and the number of the instruction after each

    def kernel(self) -> Kernel:
        for match in _ARRAY.finditer(self.text[: self.entry.start()]):
            self._declare(match)
        self._body()
        parameters, size = _parameters(self.entry[2])
        blocks, labels = self._blocks()
        arrays = {name: _placed(array, self.used["shared"]) for name, array in self.arrays.items()}
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", self.entry[3])
        return Kernel(
            name=self.entry[1],
            parameters=parameters,
            parameter_bytes=size,
            registers=self.registers,
            arrays=arrays,
            blocks=blocks,
            labels=labels,
            instructions=self.instructions,
            shared_bytes=self.used["shared"],
            local_bytes=self.used["local"],
            max_threads=None if threads is None else int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1),
        )

    def _line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def _body(self) -> None:
        text, position, depth, source = self.text, self.entry.end(), 1, ""
        line, counted = self._line(position), position
        while depth:
            if position >= len(text):
                raise PTXError(f"kernel {self.entry[1]} has no end")
            if text[position].isspace():
                position += 1
            elif found := _COMMENT.match(text, position):
                position = found.end()
            elif text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
                self.scopes.append({}) if text[position] == "{" else self.scopes.pop()
                position += 1
            elif found := _LOC.match(text, position):
                source, position = found[4] or f"file {found[1]}, line {found[2]}", found.end()
            elif found := _LABEL.match(text, position):
                self.marks.append((found[1], len(self.instructions)))
                position = found.end()
            else:
                end = text.find(";", position)
                line, counted = line + text.count("\n", counted, position), position
                statement = " ".join(_COMMENT.sub("", text[position:end]).split())
                if statement.startswith("."):
                    self._directive(statement, line)
                else:
                    self._instruction(statement, line, source)
                position = end + 1

    def _directive(self, statement: str, line: int) -> None:
        if found := _REG.match(statement):
            for item in found[2].split(","):
                self._register(item.strip(), found[1], line)
        elif found := _ARRAY.match(statement + ";"):
            self._declare(found)
        elif not statement.startswith((".pragma", ".loc", ".file")):
            raise Unsupported(f"line {line}: {statement}")

    def _register(self, item: str, kind: str, line: int) -> None:
        found = re.fullmatch(r"([%$\w]+)(?:<(\d+)>)?", item)
        kind = _CLASS.get(kind, "b" + kind[1:])
        if found is None or kind not in ("p", "b16", "b32", "b64"):
            raise Unsupported(f"line {line}: register {item} of .{kind}")
        for name in [found[1]] if found[2] is None else [f"{found[1]}{i}" for i in range(int(found[2]))]:
            register = Register(len(self.registers), name, kind)
            self.registers.append(register)
            self.scopes[-1][name] = register

    def _declare(self, match: re.Match[str]) -> None:
        space, align, kind, name, count, values = match.groups()
        size = SIZES[kind] * (1 if count is None else int(count or 0))
        boundary, data, offset = int(align or SIZES[kind]), b"", 0
        if values is not None:
            numbers = [int(value, 0) for value in values.strip("{} \n").split(",")]
            mask = (1 << 8 * SIZES[kind]) - 1
            data = b"".join((number & mask).to_bytes(SIZES[kind], "little") for number in numbers).ljust(size, b"\0")
        if space in self.used:
            offset = -(-self.used[space] // boundary) * boundary
            self.used[space] = offset + size
        self.arrays[name] = Array(name, space, boundary, size, data, offset)

    def _instruction(self, statement: str, line: int, source: str) -> None:
        found = _STATEMENT.match(statement)
        if found is None:
            raise Unsupported(f"line {line}: {statement}")
        guard = None if found[2] is None else self._lookup(found[2])
        if guard is not None and not isinstance(guard, Register):
            raise PTXError(f"line {line}: unknown predicate in {statement}")
        operands = tuple(self._operand(item, line) for item in _split(found[4]))
        number = len(self.instructions)
        self.instructions.append(
            Instruction(found[3], operands, guard, found[1] == "!", number, line, statement, source)
        )

    def _lookup(self, name: str) -> Register | Name:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), Name(name))

    def _operand(self, item: str, line: int) -> Operand:
        if item.startswith("{"):
            return Vector(tuple(self._operand(part, line) for part in _split(item[1:-1])))
        if item.startswith("["):
            return self._address(item[1:-1].strip(), line)
        if item.startswith("!"):
            return Negated(self._operand(item[1:].strip(), line))
        if "|" in item:
            first, second = (self._operand(part.strip(), line) for part in item.split("|"))
            return Pair(first, second)
        immediate = _immediate(item)
        return self._lookup(item) if immediate is None else immediate

    def _address(self, item: str, line: int) -> Address:
        found = re.fullmatch(r"([%$\w.]+?)\s*(?:([+-])\s*(-?\w+))?", item)
        if found is None:
            raise Unsupported(f"line {line}: address [{item}]")
        offset = 0 if found[3] is None else int(found[3], 0) * (-1 if found[2] == "-" else 1)
        immediate = _immediate(found[1])
        return Address(self._lookup(found[1]), offset) if immediate is None else Address(None, immediate.value + offset)

    def _blocks(self) -> tuple[list[Block], dict[str, int]]:
        targets = {o.name for i in self.instructions if i.parts[0] == "bra" for o in i.operands if isinstance(o, Name)}
        starts = {0} | {at for name, at in self.marks if name in targets}
        starts |= {i.number + 1 for i in self.instructions if i.ends_block}
        ordered = sorted(start for start in starts if start < len(self.instructions))
        blocks = [
            Block(index, self.instructions[start:end])
            for index, (start, end) in enumerate(zip(ordered, [*ordered[1:], len(self.instructions)], strict=True))
        ]
        index_of = {start: index for index, start in enumerate(ordered)}
        return blocks, {name: index_of.get(at, len(blocks)) for name, at in self.marks if name in targets}


def _placed(array: Array, shared: int) -> Array:
    """What is .extern in shared memory follows what is declared with a size."""
    if array.space == "shared" and not array.size:
        offset = -(-shared // array.align) * array.align
        return Array(array.name, array.space, array.align, 0, b"", offset)
    return array


def _parameters(text: str) -> tuple[list[Parameter], int]:
    parameters: list[Parameter] = []
    used = 0
    for item in text.split(","):
        if not item.strip():
            continue
        found = _PARAM.match(item.strip())
        if found is None:
            raise Unsupported(f"parameter {item.strip()}")
        size = SIZES[found[2]] * int(found[5] or 1)
        boundary = int(found[1] or SIZES[found[2]])
        used = -(-used // boundary) * boundary
        parameters.append(Parameter(found[4], found[2], used, size, ".ptr" in found[3]))
        used += size
    return parameters, used


def _split(text: str) -> Iterator[str]:
    """At commas that are in no bracket."""
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            yield text[start:position].strip()
            start = position + 1
    if text[start:].strip():
        yield text[start:].strip()


def _immediate(item: str) -> Immediate | None:
    if found := re.fullmatch(r"(-?)0[fF]([0-9a-fA-F]{8})", item):
        return Immediate(int(found[2], 16) ^ (0x80000000 if found[1] else 0), 32)
    if found := re.fullmatch(r"(-?)0[dD]([0-9a-fA-F]{16})", item):
        return Immediate(int(found[2], 16) ^ (1 << 63 if found[1] else 0), 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", item):
        digits = item.rstrip("U")
        octal = re.fullmatch(r"-?0\d+", digits)
        return Immediate(int(digits, 8) if octal else int(digits, 0))
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", item):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(item)))[0], 64)
    return None
