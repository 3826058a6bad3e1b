"""The project's kernels as they are launched, compiled for sm_90 and ready for the simulator."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from compiled import KERNELS, Shape, binary_of, parameters_of
from laboratory.simulator.assumptions import Assumptions
from laboratory.simulator.core import STARTS, Result
from laboratory.simulator.kernel import Kernel, Parameter, Partial, Role, Stream, Token
from megatron_fc.errors import UserError

BYTES = 2  # of an element of the stream
# Rows of d elements that a kernel has to move per token, a r + b with r = n/m (docs/kernels.md): a and b.
ROWS = {
    "width forward": (1, 1),
    "width backward": (3, 1),
    "depth forward": (2, 1),
    "depth backward": (1, 2),
    "boundary forward": (2, 2),
    "boundary backward": (3, 3),
}
STREAMS = frozenset(("h", "g", "g_mixed", "g_h", "out", "pre.h"))
OF_SUB_LAYERS = frozenset(("x", "g_x", "pre.o", "pre.g_o"))
TOKEN_VALUES = frozenset(("beta", "alpha", "g_beta", "pre.beta", "pre.alpha", "pre.g_beta", "given"))
PARAMETERS = frozenset(("p", "norm", "pre.bias", "pre.seed"))


@dataclass(frozen=True)
class Launched:
    """A kernel at a shape, compiled; `tile_tokens` tokens, or a part of one, of a tile move `tile_bytes` at least.

    `programs` per processor; 0: as many as fit.
    """

    shape: Shape
    kernel: Kernel
    programs: int
    tile_tokens: float
    tile_bytes: float

    def load(self, cycles: float, assumed: Assumptions) -> float:
        """Per cent of the time of a copy of a tile that a processor's unit is taken for so many cycles."""
        return 100 * cycles * assumed.dram / self.tile_bytes

    def runs(self, tokens: int, assumed: Assumptions) -> list[Result]:
        """One result per start.

        Raises:
            UserError: the tokens are no whole tiles.
        """
        tiles, left = divmod(tokens, self.tile_tokens)
        if left or not tiles:
            raise UserError(
                f"--tokens {tokens} are no whole tiles: a tile of n = {self.shape.slots} has {self.tile_tokens}"
            )
        return [self.kernel.simulate(assumed, int(tiles), self.programs, seed, skew) for seed, skew in STARTS]

    def share(self, runs: Sequence[Result], tokens: int, assumed: Assumptions) -> float:
        """Mean of the runs."""
        copy_us = tokens / self.tile_tokens * self.tile_bytes / (assumed.copy_tbs * 1e6)
        return sum(100 * copy_us / run.us for run in runs) / len(runs)


def rows_moved(shape: Shape) -> float:
    """Rows of d elements that a kernel has to move per token.

    Raises:
        UserError: it is not said here.
    """
    ideal = ROWS.get(shape.kernel.removeprefix("given ").partition(",")[0])
    if ideal is None:
        raise UserError(f"kernel {shape.kernel!r} is not in ROWS of benchmarks/launched.py: say how many rows it moves")
    streams, inputs = ideal
    return streams * shape.slots / shape.rate + inputs


@functools.cache
def launched(shape: Shape) -> Launched:
    """Compile a kernel for sm_90 as it would be launched.

    Raises:
        UserError: a kernel, or a pointer of it, of which nothing is said here.
    """
    name, width, m, n = shape
    rows = rows_moved(shape)
    binary, found = binary_of(shape, 90)
    site = found.site
    is_general = found.kernel is KERNELS[name][0]

    def role(pointer: str) -> Role:
        if pointer in STREAMS:
            return Stream(site.R * site.C * BYTES)
        if pointer in OF_SUB_LAYERS:
            # A tile of a general kernel has rows for all slots, of which the fractions' alone are read or written.
            return Stream(site.R * site.C * BYTES * m // n, m / n if is_general else 1.0)
        if pointer in TOKEN_VALUES or pointer.partition(".")[0] in TOKEN_VALUES:
            return Token()
        if pointer.startswith("partial."):
            return Partial()
        if pointer in PARAMETERS or pointer.partition(".")[0] in PARAMETERS:
            return Parameter()
        raise UserError(
            f"pointer {pointer!r} of kernel {name!r} is in no set of benchmarks/launched.py: say what it points to"
        )

    kernel = Kernel(
        binary.asm["cubin"],
        binary.asm["ptx"],
        parameters_of(name),
        role,
        site.W,
        binary.metadata.shared,
        # Every loop inside of the tile's goes over chunks: a main kernel's only where values are not finite.
        trips=site.CHUNKS if is_general else 0,
    )
    tokens = site.R // n
    return Launched(shape, kernel, found.cut.programs, tokens, int(tokens * rows * width) * BYTES)
