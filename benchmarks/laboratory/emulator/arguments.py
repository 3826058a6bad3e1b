"""A launch's arguments, and the bytes that a kernel finds its parameters in."""

import struct
from collections.abc import Sequence

import numpy as np

from laboratory.emulator.arith import Array
from laboratory.emulator.errors import PTXError
from laboratory.emulator.memory import GlobalMemory
from laboratory.emulator.syntax import Kernel, Parameter

Argument = Array | int | float | bool | None


def complete(kernel: Kernel, args: Sequence[Argument]) -> list[Argument]:
    """An argument for every parameter: pointers at the end that were left out are null."""
    missing = kernel.parameters[len(args) :]
    if len(args) > len(kernel.parameters) or any(not parameter.is_pointer for parameter in missing):
        kinds = ", ".join(parameter.type for parameter in kernel.parameters)
        raise PTXError(f"{kernel.name} takes {len(kernel.parameters)} arguments ({kinds}), not {len(args)}")
    return [*args, *[None] * len(missing)]


def pack(kernel: Kernel, args: Sequence[Argument], memory: GlobalMemory) -> bytes:
    """The parameters as a launch lays them out."""
    out = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(kernel.parameters, args, strict=True):
        out[parameter.offset : parameter.offset + parameter.size] = _packed(parameter, value, memory)
    return bytes(out)


def _packed(parameter: Parameter, value: Argument, memory: GlobalMemory) -> bytes:
    if isinstance(value, np.ndarray) and value.ndim:
        if not parameter.is_pointer and parameter.type != "u64":
            raise PTXError(f"{parameter.name} is a {parameter.type}, not a pointer")
        return memory.address(value).to_bytes(8, "little")
    if value is None:
        return bytes(parameter.size)
    if parameter.type in ("f32", "f64"):
        return struct.pack("<f" if parameter.type == "f32" else "<d", value)
    return (int(value) & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
