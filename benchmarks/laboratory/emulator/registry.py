"""The handlers of opcodes: each writes the Python of one kind of instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from laboratory.emulator.syntax import Instruction

if TYPE_CHECKING:
    from laboratory.emulator.writer import Writer

INTEGERS = {"u16", "u32", "u64", "s16", "s32", "s64", "b16", "b32", "b64", "u8", "s8", "b8"}
FLOATS = {"f16", "f32", "f64", "bf16"}
PACKED = {"f16x2", "bf16x2"}

Handler = Callable[["Writer", Instruction, list[str]], None]
HANDLERS: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def integer(kind: str, signed: bool | None = None) -> str:
    """u32 for b32, and with `signed` as that says."""
    letter = "u" if kind[0] == "b" else kind[0]
    return (letter if signed is None else "s" if signed else "u") + kind[1:]


def split(parts: list[str], known: set[str]) -> tuple[str, set[str]]:
    """The type, which comes last, and the modifiers; those that are not known are an error."""
    kind, rest = parts[-1], set(parts[:-1])
    if rest - known:
        raise KeyError(", ".join(sorted(rest - known)))
    return kind, rest


def checked(handler: Handler) -> Handler:
    """Unknown modifiers become an error that names the instruction."""

    def checked(w: Writer, i: Instruction, parts: list[str]) -> None:
        try:
            handler(w, i, parts)
        except (KeyError, IndexError, ValueError, AssertionError) as error:
            w.unsupported(f"{error}")

    return checked
