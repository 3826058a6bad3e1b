"""Cuts of the general kernels' work: warps, columns and programs, and the site that a kernel is compiled for."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_fc.connections.kernels.tiles import Site
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands

INTERPRETED = bool(triton.knobs.runtime.interpret)
_ROWS = 16  # of a tile: what a tensor core's product needs


class Cut(NamedTuple):
    """How a kernel's work is cut: warps of a program, columns of a warp in a chunk, programs per processor of a GPU."""

    warps: int
    columns: int
    programs: int

    @property
    def registers(self) -> int:
        """Of a thread, so that as many programs fit."""
        return min(255, 65536 // (self.programs * self.warps * 32))


# As many warps as registers leave room for, and by what was predicted (benchmarks/results/predicted-h200.md). Programs
# of one warp meet no barriers and are predicted within 10 points of these, but twice as many share the cache that holds
# their tiles, whose second reads predictions take for hits: hence also fewer for wide slots (docs/kernels.md). A depth
# connection has few registers and many loads.
WIDTH, WIDTH_BACKWARD, DEPTH = Cut(2, 64, 8), Cut(2, 32, 4), Cut(4, 32, 6)
_WIDE = 1024  # columns of a slot
if INTERPRETED:  # where time goes by operations, not by what they work on
    WIDTH, WIDTH_BACKWARD, DEPTH = Cut(8, 32, 1), Cut(8, 16, 1), Cut(8, 32, 1)


def cut_for(cut: Cut, c: int) -> Cut:
    """The cut of a width connection's kernel for slots of c columns, whose tiles are as wide."""
    while c > _WIDE and cut.warps < 8:
        cut, c = Cut(2 * cut.warps, cut.columns, cut.programs // 2), -(-c // 2)
    return cut


def site_of(
    cut: Cut, h: Tensor, slots: int, fractions: int, p: Operands | None = None, norm: NormWeights | None = None
) -> Site:
    """What the kernels are compiled for, from a stream [..., n*c] and the options; a depth connection has none."""
    c = h.shape[-1] // slots
    covered = max(16, triton.next_power_of_2(c))
    warps = min(cut.warps, covered // 16)
    values = 1 + fractions + slots
    padded = max(_ROWS, triton.next_power_of_2(values))
    columns = min(cut.columns, 1024 // padded, covered // warps)  # longer tables leave registers for fewer
    predicted = 0 if p is None or p.dynamic_weight is None else p.dynamic_weight.shape[0]
    first = int(predicted == values - 1)  # beta is static
    return Site(
        N=slots,
        M=fractions,
        C=c,
        R=_ROWS,
        W=warps,
        K=columns,
        # Lanes move 16 bytes each.
        L=min(_ROWS, 32 * 16 // (2 * columns)),
        CHUNKS=-(-c // (warps * columns)),
        KP=padded,
        FROM=first,
        TO=first + predicted,
        NORM=p.norm if p is not None and predicted else "none",
        EPS=p.norm_eps if p is not None else 1.0,
        TANH=p is not None and p.tanh,
        SUB_NORM=norm.kind if norm is not None else "none",
        SUB_EPS=norm.eps if norm is not None else 1.0,
        ONE_PLUS=norm.one_plus if norm is not None else False,
        # The interpreter's products are wrong in bf16.
        EXACT=h.dtype == torch.float32 or (INTERPRETED and h.dtype == torch.bfloat16),
    )


def options(site: Site, cut: Cut) -> dict[str, int]:
    """Of the compiler."""
    return {"num_warps": site.W, "num_stages": 1, "maxnreg": cut.registers}


def programs(count: int, device: torch.device, cut: Cut) -> int:
    """Programs for so many rows: they go on to the next tile until none is left."""
    return min(-(-count // _ROWS), cut.programs * _processors(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
