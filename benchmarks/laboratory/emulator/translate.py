"""A kernel's basic blocks to Python functions on numpy arrays (`writer` has their form)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from laboratory.emulator import arith, fragments
from laboratory.emulator.liveness import live_after
from laboratory.emulator.opcodes import HANDLERS
from laboratory.emulator.syntax import Kernel
from laboratory.emulator.writer import Jump, Writer


@dataclass(frozen=True)
class Program:
    """A kernel as functions, one for each block."""

    kernel: Kernel
    blocks: list[Callable[..., Any]]
    jumps: list[Jump]
    source: str  # their text
    cells: dict[str, int]  # bytes of the smallest access, by space


def translate(kernel: Kernel, truncate: bool = False) -> Program:
    """`truncate`: matrix products round toward zero rather than to nearest."""
    live = live_after(kernel)
    parts, jumps = [], []
    cells = {"shared": 16, "global": 16}
    for block in kernel.blocks:
        writer = Writer(kernel, block, live[block.index], HANDLERS, truncate, cells)
        parts.append(writer.source())
        jumps.append(writer.jump)
    source = "\n".join(parts)
    names = _names()
    exec(compile(source, f"<{kernel.name}>", "exec"), names)
    return Program(kernel, [names[f"block_{block.index}"] for block in kernel.blocks], jumps, source, cells)


def _names() -> dict[str, Any]:
    """The functions that the generated ones call."""
    functions = {name: getattr(arith, name) for name in dir(arith) if not name.startswith("_")}
    shorthands = {"np": np, "where": np.where, "fmax": np.fmax, "fmin": np.fmin, "fragments": fragments}
    wide = {name: arith.through_f64(getattr(np, name)) for name in ("exp2", "log2", "sin", "cos", "tanh")}
    return functions | shorthands | wide
