"""Instructions of one sm_90 kernel with their control codes, and its loops, from the text of Triton's `nvdisasm`."""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
FREE = 7  # in place of a scoreboard: none

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;?\s*/\*\s*0x([0-9a-f]{16})\s*\*/"
)
_SECOND_HALF = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_WIDTHS = ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))


@dataclass(frozen=True)
class Instruction:
    """One line of the code.

    Attributes:
        op: full name, `LDG.E.128`.
        stall: cycles to the next instruction of the warp.
        result: scoreboard that is set until the result is there, `FREE` for none.
        operands: the same until the operands are read.
        wait: mask of the scoreboards that have to be clear before.
    """

    predicate: str
    op: str
    arguments: str
    stall: int
    result: int
    operands: int
    wait: int

    @property
    def base(self) -> str:
        return self.op.partition(".")[0]

    @property
    def lane_bytes(self) -> int:
        """Bytes that one lane moves, where it moves any."""
        if self.base in ("LDSM", "STSM"):
            return 4 * int(self.op[-1]) if self.op[-2:] in (".2", ".4") else 4
        return next((width for mark, width in _WIDTHS if mark in self.op), 4)

    @property
    def is_global(self) -> bool:
        return self.base in ("LDG", "STG", "LDGSTS", "RED", "ATOMG")

    @property
    def is_global_store(self) -> bool:
        return self.base in ("STG", "RED", "ATOMG")


@dataclass(frozen=True)
class Loop:
    """A backward branch: indices of the first instruction and of the branch."""

    head: int
    back: int

    def holds(self, other: "Loop") -> bool:
        return self.head <= other.head and other.back <= self.back and self != other


def disassemble(cubin: bytes) -> str:
    """The text of `nvdisasm -c -hex` for a binary of one kernel."""
    return _tool("nvdisasm", "-c", "-hex", cubin=cubin)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text := _tool("cuobjdump", "--dump-resource-usage", cubin=cubin))
    assert found is not None, text
    return int(found[1]), int(found[2])


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions up to the last exit, and the index behind each label.

    An instruction is two 64-bit words; control codes are bits 41 to 57 of the second: stall (4 bits), yield (1), two
    scoreboards (3 each), mask of waits (6). Source: this layout reproduces the compiler's own dependences in every
    binary that was looked at; NVIDIA documents none.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    half: re.Match[str] | None = None
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            half = found
        elif half is not None and (second := _SECOND_HALF.match(line)):
            code = int(second[1], 16) >> 41
            labels |= dict.fromkeys(waiting, len(instructions))
            waiting.clear()
            names = (half[2] or "", half[3], half[4].rstrip(" ;"))
            instructions.append(Instruction(*names, code & 15, code >> 5 & 7, code >> 8 & 7, code >> 11 & 63))
            half = None
    last = max(k for k, i in enumerate(instructions) if i.base in ("EXIT", "RET"))
    return instructions[: last + 1], labels


def loops(code: Sequence[Instruction], labels: Mapping[str, int]) -> list[Loop]:
    """All loops by their heads, outer ones first."""
    found = []
    for k, i in enumerate(code):
        target = re.search(r"\.L_x_\d+", i.arguments) if i.base == "BRA" else None
        if target is not None and labels.get(target[0], k + 1) <= k:
            found.append(Loop(labels[target[0]], k))
    return sorted(found, key=lambda loop: (loop.head, -loop.back))


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout
