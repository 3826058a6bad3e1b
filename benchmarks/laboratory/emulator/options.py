"""Ways to run a kernel, and what a run took."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from laboratory.emulator.arith import Array

# CTAs and addresses of the threads that access global memory in an instruction, bytes of each, whether it writes.
Traffic = Callable[[Array, Array, int, bool], None]


@dataclass
class Statistics:
    """What a run took: instructions, each counted once for all the threads that ran it together."""

    ctas: int = 0
    instructions: int = 0


@dataclass(frozen=True)
class Options:
    """How a kernel is run.

    Attributes:
        shared: bytes of dynamic shared memory of a CTA, as the launch asks for (Triton's metadata.shared).
        ctas: the order in which CTAs are run, by their numbers or in one that `seed` decides, so that a result which
            depends on it changes.
        order: "lockstep" has all warps go side by side, CTAs too; "random" runs the warps one after another from
            barrier to barrier, in an order that `seed` decides, so that a missing barrier changes results.
        races: watch every access to shared and global memory, and raise where threads of different warps ("warps"), or
            of one warp as well ("lanes"), touch the same bytes with no barrier between, one of them writing; "values"
            also where lanes write different values to one place in one instruction, of which PTX lets any stay.
        uninitialised: what shared and local memory hold before they are written: "poison", which is NaN in every
            format, "zero", or "error": reading them raises.
        rounding: of matrix products: "nearest", or "zero" as tensor cores truncate.
        threads: that run together at most, of as many CTAs as fit.
        traffic: is called with every access to global memory; addresses are those of the caller's arrays.
        limit: of blocks that a batch runs, against loops that do not end.
    """

    shared: int | None = None
    ctas: Literal["ascending", "random"] = "ascending"
    order: Literal["lockstep", "random"] = "lockstep"
    seed: int = 0
    races: Literal["warps", "lanes", "values"] | None = None
    uninitialised: Literal["poison", "zero", "error"] = "poison"
    rounding: Literal["nearest", "zero"] = "nearest"
    threads: int = 4096
    traffic: Traffic | None = None
    limit: int = 5_000_000
