"""Cuts of the main kernels' work: which kernel does a shape, how many warps and rows a tile has, and what fits."""

from typing import Any, Literal, NamedTuple

from megatron_fc.connections.kernels.tiles import Site

_COLUMNS = 64  # of a warp in a chunk
_REGISTERS = 65536 // 32  # of a processor, by the lanes of a warp
Direction = Literal["forward", "backward"]


class Main(NamedTuple):
    """A main kernel as it is launched: what it is compiled for, and programs per processor of a GPU."""

    kernel: Any
    site: Site
    programs: int


def planned(direction: Direction, site: Site, boundary: bool, room: int) -> Main | str:
    """The main kernel for what the general one would run as `site`, or why there is none.

    room: bytes of shared memory that a program may have.
    """
    obstacle = first_of(
        {
            f"{site.N} slots with {site.M} fractions": site.N != site.M and (site.N not in (2, 4) or site.M != 1),
            f"rate {site.M}": site.N == site.M and site.M not in (2, 4, 8),
            "static coefficients": site.TO - site.FROM != 1 + site.M + site.N,
            "layer norms": "layernorm" in (site.NORM, site.SUB_NORM),
            _columns(site): site.C % 16 != 0,
        }
    )
    if obstacle:
        return obstacle
    narrow, wide = _narrow(direction, site), _wide(direction, site)
    if narrow is not None and (programs := _programs(narrow_bytes, narrow, direction, boundary, room)):
        return Main(_kernel(direction, False), narrow, programs)
    for cut in wide:
        if programs := _programs(wide_bytes, cut, direction, boundary, room):
            return Main(_kernel(direction, True), cut, programs)
    if narrow is not None or wide:
        return f"{site.C} columns of a fraction do not fit into shared memory"
    return first_of({_columns(site): True}) or ""


def first_of(obstacles: dict[str, bool]) -> str | None:
    """The first of what main kernels do not do that is so."""
    return next((f"the main one does not do {what}" for what, is_so in obstacles.items() if is_so), None)


def _columns(site: Site) -> str:
    return f"{site.C} columns of a {'fraction' if site.M > 1 else 'slot'}"


def _cut(site: Site, warps: int, **changes: int) -> Site | None:
    """None if most of its columns would be padding."""
    cut = site._replace(W=warps, K=_COLUMNS, CHUNKS=-(-site.C // (warps * _COLUMNS)), **changes)
    return cut if cut.W * cut.K * cut.CHUNKS <= 2 * site.C else None


def _narrow(direction: Direction, site: Site) -> Site | None:
    """The site with the work cut for the kernels in which tensor cores mix as many slots as fractions."""
    cut = _cut(site, 4 if site.C * (site.KP // 16) <= 512 else 8) if site.N == site.M else None
    chunks = 4 if direction == "forward" else 32 // site.KP  # sums of more columns do not fit into registers
    return cut if cut is not None and cut.CHUNKS <= chunks else None


def _wide(direction: Direction, site: Site) -> list[Site]:
    """The site with the work cut for the kernels of wide slots, of tiles with as many rows as fit or half of these."""
    if site.M > 2:
        return []
    cuts = [_cut(site, 4 if site.C <= 512 else 8, KP=8, R=rows) for rows in (16, 8)]
    return [cut for cut in cuts if cut is not None and cut.CHUNKS <= 8]


def _programs(count_bytes: Any, cut: Site, direction: Direction, boundary: bool, room: int) -> int:
    """Programs per processor that shared memory and registers have room for."""
    by_memory = (room + 1024) // (count_bytes(direction, cut, boundary) + 1024)
    return min(by_memory, _REGISTERS // (registers(direction, cut, boundary) * cut.W))


def _kernel(direction: Direction, wide: bool) -> Any:
    """Loads Gluon, which another Triton may not have."""
    from megatron_fc.connections.kernels.gluon import backward, forward, wide_backward, wide_forward

    if direction == "forward":
        return wide_forward.wide_forward_kernel if wide else forward.main_forward_kernel
    return wide_backward.wide_backward_kernel if wide else backward.main_backward_kernel


def registers(direction: Direction, site: Site, boundary: bool) -> int:
    """Of a thread, as compiled for sm_90, or a few more: weights and sums of every chunk stay there."""
    if direction == "backward" or site.CHUNKS > 2:
        return 256
    if site.CHUNKS == 2:
        return 256 if boundary else 168
    return 184 if boundary else 128


def narrow_bytes(direction: Direction, site: Site, boundary: bool) -> int:
    """Shared memory of a program of the kernels of as many slots as fractions, or a little more."""
    if direction == "forward":
        tiles, products, matrices = 1 + boundary, 1, 2 * site.R
    else:
        tiles, products, matrices = 3 + boundary + (site.SUB_NORM != "none"), 3, 3 * site.R + site.KP
    rows = (tiles * site.R + site.KP) * site.W * site.K * site.CHUNKS * 2
    tables = site.W * site.R * (site.KP + products * site.M) * 4
    return rows + tables + 2 * site.R * matrices * 2 + 1024 * site.W


def wide_bytes(direction: Direction, site: Site, boundary: bool) -> int:
    """Shared memory of a program of the kernels of wide slots, or a little more."""
    tokens = site.R // site.N
    rows, products = site.R + site.KP, site.KP + site.N
    if direction == "backward":
        rows, products = rows + site.R + (tokens + 1) * site.M, products + site.M + site.N
    tables = site.R * (2 * site.N + 2 * site.M + 3 * site.KP + 4)
    return rows * site.W * site.K * site.CHUNKS * 2 + (site.W * 16 * products + tables) * 4 + 1024
