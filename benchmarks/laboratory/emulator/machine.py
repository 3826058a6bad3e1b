"""All that instructions need of the threads that run together."""

from laboratory.emulator.atomics import Atomics
from laboratory.emulator.copies import Copies
from laboratory.emulator.lanes import Lanes
from laboratory.emulator.matrices import Matrices
from laboratory.emulator.special import Special


class Machine(Atomics, Copies, Matrices, Lanes, Special):
    """The same warps of every CTA of a batch, with memory, lanes, copies and special registers."""
