"""An emulator of compiled GPU kernels: runs PTX on numpy arrays (docs/laboratory.md)."""

from laboratory.emulator.errors import AccessError, Hang, PTXError, RaceError, Unsupported
from laboratory.emulator.options import Options, Statistics
from laboratory.emulator.run import run

__all__ = ["AccessError", "Hang", "Options", "PTXError", "RaceError", "Statistics", "Unsupported", "run"]
