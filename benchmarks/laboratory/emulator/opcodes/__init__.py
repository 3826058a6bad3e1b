"""The instructions that are known, by the kind of what they do."""

from laboratory.emulator.opcodes import (  # noqa: F401 - each registers its handlers
    arithmetic,
    bits,
    comparison,
    control,
    conversion,
    copies,
    lanes,
    memory,
    moves,
    products,
)
from laboratory.emulator.registry import HANDLERS

__all__ = ["HANDLERS"]
