"""The parts of a kernel's text: registers, operands, instructions, arrays, basic blocks."""

from dataclasses import dataclass, field

SIZES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8, "s8": 1, "s16": 2, "s32": 4}
SIZES |= {"s64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4}


@dataclass(frozen=True)
class Register:
    """A register by its number in the kernel's file; kind is p (predicate), b16, b32 or b64."""

    index: int
    name: str
    kind: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a float of `float_bits` bits."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Name:
    """A special register (%tid.x), an array in memory, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    base: Register | Name | None
    offset: int


@dataclass(frozen=True)
class Negated:
    """!p."""

    operand: "Operand"


@dataclass(frozen=True)
class Pair:
    """p|q or d|p: two results."""

    first: "Operand"
    second: "Operand"


Operand = Register | Immediate | Name | Vector | Address | Negated | Pair


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None  # executed where it is true
    negated: bool  # or false
    number: int  # in the kernel
    line: int  # of the text, from 1
    text: str
    source: str  # of the program that was compiled, if the text says it

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def ends_block(self) -> bool:
        """A branch, an end, or a barrier of the whole CTA."""
        kind, *rest = self.parts
        return kind in ("bra", "ret", "exit") or (kind in ("bar", "barrier") and "warp" not in rest)

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" + (f"  // {self.source}" if self.source else "")


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # u64, f32, ...
    offset: int
    size: int
    is_pointer: bool


@dataclass(frozen=True)
class Array:
    """A declared array: in shared or local memory at an offset, in constant or global memory with its values."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""
    offset: int = 0


@dataclass
class Block:
    """Instructions that run one after another; only the last may branch, wait or end."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    registers: list[Register]
    arrays: dict[str, Array]
    blocks: list[Block]
    labels: dict[str, int]  # to blocks
    instructions: list[Instruction]
    shared_bytes: int  # declared; what is .extern begins after it
    local_bytes: int
    max_threads: int | None  # of a CTA, as .reqntid or .maxntid say
