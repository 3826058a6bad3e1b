"""Cuts of the main kernels' work: which kernel does a shape, how many warps and rows a tile has, and what fits."""

from typing import Any, Literal, NamedTuple

from megatron_fc.connections.kernels.availability import has_main_kernels
from megatron_fc.connections.kernels.tiles import Site

_COLUMNS = 64  # of a warp in a chunk
_REGISTERS = 65536 // 32  # of a processor, by the lanes of a warp
_DEPTH_REGISTERS = 64
Direction = Literal["forward", "backward"]


class Main(NamedTuple):
    """A main kernel as it is launched: what it is compiled for, and programs per processor of a GPU."""

    kernel: Any
    site: Site
    programs: int


class Needs(NamedTuple):
    """What a program needs, or a little more: bytes of shared memory, and registers of a thread as on sm_90."""

    shared: int
    registers: int


def planned(direction: Direction, site: Site, boundary: bool, room: int, given: bool = False) -> Main | str:
    """The main kernel for what the general one would run as `site`, or why there is none.

    Args:
        direction: of the pass.
        site: of the general kernel.
        boundary: a depth connection comes first.
        room: bytes of shared memory that a program may have.
        given: its coefficients come from elsewhere.
    """
    obstacle = first_of(
        {
            f"{site.N} slots with {site.M} fractions": not has_main_kernels(site.N, site.M, given),
            "static coefficients": not given and site.TO - site.FROM != 1 + site.M + site.N,
            "layer norms": "layernorm" in (site.NORM, site.SUB_NORM),
            _columns(site): site.C % 16 != 0,
        }
    )
    if obstacle:
        return obstacle
    narrow = [] if given else _narrow(direction, site)
    ways = [(cut, _needs(direction, cut, boundary), False) for cut in narrow]
    ways += [(cut, _wide_needs(direction, cut, given), True) for cut in _wide(site)]
    for cut, needs, wide in ways:
        by_memory = (room + 1024) // (needs.shared + 1024)
        if by_memory:
            return Main(_kernel(direction, wide), cut, min(by_memory, _REGISTERS // (needs.registers * cut.W)))
    if ways:
        return f"{site.C} columns of a {_part(site)} do not fit into shared memory"
    return first_of({_columns(site): True}) or ""


def planned_depth(site: Site, room: int) -> Main | None:
    """The main kernel of a depth connection: where a boundary of wide slots runs on one, so that both round alike."""
    predicted = site._replace(FROM=0, TO=1 + site.M + site.N)
    main = planned("forward", predicted, True, room)
    if isinstance(main, str) or main.kernel is not _kernel("forward", True):
        return None
    from megatron_fc.connections.kernels.gluon.wide_depth import wide_depth_kernel

    cut = main.site._replace(R=site.N)
    return Main(wide_depth_kernel, cut, _REGISTERS // (_DEPTH_REGISTERS * cut.W))


def first_of(obstacles: dict[str, bool]) -> str | None:
    """The first of what main kernels do not do that is so."""
    return next((f"the main one does not do {what}" for what, is_so in obstacles.items() if is_so), None)


def _part(site: Site) -> str:
    return "fraction" if site.N == site.M else "slot"


def _columns(site: Site) -> str:
    return f"{site.C} columns of a {_part(site)}"


def _cuts(site: Site, warps: int, rows: tuple[int, ...], chunks: int, padded: int) -> list[Site]:
    """None if most columns would be padding, or there are more chunks than these."""
    n = -(-site.C // (warps * _COLUMNS))
    if warps * _COLUMNS * n > 2 * site.C or n > chunks:
        return []
    return [site._replace(W=warps, K=_COLUMNS, CHUNKS=n, R=r, KP=padded) for r in rows]


def _narrow(direction: Direction, site: Site) -> list[Site]:
    """For the kernels in which tensor cores mix as many slots as fractions."""
    warps = 4 if site.C * (site.KP // 16) <= 512 else 8
    chunks = 4 if direction == "forward" else 32 // site.KP  # sums of more columns do not fit into registers
    return _cuts(site, warps, (16,), chunks, site.KP) if site.N == site.M else []


def _wide(site: Site) -> list[Site]:
    """For the kernels of wide slots: tiles of as many rows as fit into shared memory, or half of these."""
    return _cuts(site, 4 if site.C <= 512 else 8, (16, 8), 8, 8) if site.M <= 2 else []


def _kernel(direction: Direction, wide: bool) -> Any:
    """Loads Gluon, which another Triton may not have."""
    from megatron_fc.connections.kernels.gluon import backward, forward, wide_backward, wide_forward

    if direction == "forward":
        return wide_forward.wide_forward_kernel if wide else forward.main_forward_kernel
    return wide_backward.wide_backward_kernel if wide else backward.main_backward_kernel


def _needs(direction: Direction, site: Site, boundary: bool) -> Needs:
    """Of the kernels of as many slots as fractions; weights and sums of every chunk stay in registers."""
    if direction == "forward":
        tiles, products, matrices = 1 + boundary, 1, 2 * site.R
    else:
        tiles, products, matrices = 3 + boundary + (site.SUB_NORM != "none"), 3, 3 * site.R + site.KP
    rows = (tiles * site.R + site.KP) * site.W * site.K * site.CHUNKS * 2
    tables = site.W * site.R * (site.KP + products * site.M) * 4
    registers = 256
    if direction == "forward" and site.CHUNKS == 2:
        registers = 256 if boundary else 168
    elif direction == "forward" and site.CHUNKS == 1:
        registers = 184 if boundary else 128
    return Needs(rows + tables + 2 * site.R * matrices * 2 + 1024 * site.W, registers)


def _wide_needs(direction: Direction, site: Site, given: bool) -> Needs:
    """Of the kernels of wide slots."""
    tokens = site.R // site.N
    rows, products = site.R + (4 if site.M + site.N < 4 else 8), site.KP + site.N
    if direction == "backward":
        rows, products = rows + site.R + (tokens + 1) * site.M, products + site.M + site.N
    tables = site.R * (2 * site.N + 2 * site.M + 3 * site.KP + 4)
    shared = rows * site.W * site.K * site.CHUNKS * 2 + (site.W * 16 * products + tables) * 4 + 1024
    return Needs(shared, 128 if given and direction == "forward" and site.CHUNKS <= 4 else 256)
