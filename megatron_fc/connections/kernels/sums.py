"""Sums over tokens, for the gradients of parameters: each program keeps its own, and one launch adds the programs' up.

No addition depends on which program or lane comes first, so that results are the same in every run.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_fc.connections.kernels.tiles import by_lanes, chunk, columns, inside, predicted, spread, table_by_rows


class Partial(NamedTuple):
    """Sums of the programs for the gradients of parameters, fp32; None for those that are not asked for."""

    projection: Tensor | None = None  # [programs, 1+m+n, c], or the predicted rows
    table: Tensor | None = None  # [programs, n, KP], of the coefficients
    scaled: Tensor | None = None  # [programs, KP], of the scales, still a sum for each coefficient
    shift: Tensor | None = None  # [programs, KP], what the means of slots take from the projection's
    weight: Tensor | None = None  # [programs, d], of the sub-layer's norm
    bias: Tensor | None = None  # [programs, d], of the same
    output_bias: Tensor | None = None  # [programs, d], of the sub-layer before, which the depth connection adds


class Gradients(NamedTuple):
    """Gradients of parameters: a site's as in `PerSlotParameters`, a norm's, an output's bias; None if absent."""

    static_beta: Tensor | None = None
    static_gamma: Tensor | None = None
    static_alpha: Tensor | None = None
    dynamic_weight: Tensor | None = None
    scale_beta: Tensor | None = None
    scale_alpha: Tensor | None = None
    norm_weight: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    output_bias: Tensor | None = None


@triton.jit
def add_to(pointer, at, values, mask, started):
    """Add to a program's own sums in memory; they begin with its first tile.

    They stay in cache. In registers there is no room for them, and other programs do not touch them: the order of
    additions, and with it the result, is always the same.
    """
    tl.store(pointer + at, tl.load(pointer + at, mask=mask & started, other=0.0) + values, mask=mask)


@triton.jit
def add_projection(pointer, dz, h, n, started, S: tl.constexpr):
    """Add dz^T h of chunk n to a program's sums for the projection [TO - FROM, c]."""
    k = by_lanes(S.KP, S)
    rows: tl.constexpr = S.TO - S.FROM
    values = spread(table_by_rows(tl.trans(dz), h, S), S)
    pointer = chunk(pointer, tl.program_id(0) * rows, n, S)
    add_to(pointer, (k - S.FROM) * S.C + columns(S), values, predicted(k, S) & inside(n, S), started)


@triton.jit
def add_weight(pointer, values, n, started, S: tl.constexpr):
    """Add chunk n, [W, R, K], over its tokens and turns to a program's sums for a weight or bias [d]."""
    values = tl.sum(tl.reshape(values, [S.W, S.R // S.M, S.M, S.K]), axis=1)
    i = tl.arange(0, S.M)[:, None, None, None]
    values = tl.permute(values, 1, 0, 2)[:, :, None, :]
    add_to(chunk(pointer, tl.program_id(0) * S.M, n, S), i * S.C + columns(S), values, inside(n, S), started)


@triton.jit
def store_table_sums(partial, table, scaled, shift, S: tl.constexpr):
    """A program's sums of tables; [R, KP] has a row per slot, token after token."""
    program, i, k = tl.program_id(0), tl.arange(0, S.N), tl.arange(0, S.KP)
    table = tl.sum(tl.reshape(table, [S.R // S.N, S.N, S.KP]), axis=0)
    tl.store(partial.table + (program * S.N + i)[:, None] * S.KP + k[None, :], table)
    if partial.scaled is not None:
        tl.store(partial.scaled + program * S.KP + k, scaled)
    if partial.shift is not None:
        tl.store(partial.shift + program * S.KP + k, shift)


@triton.jit
def over_programs(pointer, size, at, mask, programs, P: tl.constexpr):
    """Sum over the programs of the values [N] at `at` of each one's `size`; P programs are read at once."""
    total = tl.zeros_like(at).to(tl.float32)
    for first in tl.range(0, programs, P):
        program = first + tl.arange(0, P)
        where = program.to(tl.int64)[:, None] * size + at[None, :]
        total += tl.sum(tl.load(pointer + where, mask=(program < programs)[:, None] & mask[None, :], other=0.0), axis=0)
    return total


@triton.jit
def reduce_projection(block, partial, p, g, programs, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """N columns of the gradients of the projection and of the slots' norm, whose weight is folded into it."""
    rows: tl.constexpr = S.TO - S.FROM
    e = tl.arange(0, S.KP * N)
    k, column = e // N, block * N + e % N
    mask = predicted(k, S) & (column < S.C)
    at = (k - S.FROM) * S.C + column
    folded = over_programs(partial.projection, rows * S.C, at, mask, programs, P)
    if partial.shift is not None:
        folded -= over_programs(partial.shift, S.KP, k, mask, programs, P)
    if p.norm_weight is None:
        tl.store(g.dynamic_weight + at, folded, mask=mask)
    else:
        norm = tl.load(p.norm_weight + column, mask=mask, other=0.0)
        tl.store(g.dynamic_weight + at, folded * norm, mask=mask)
        # A choice, as in `row_sum`.
        products = tl.where(mask, folded * tl.load(p.dynamic_weight + at, mask=mask, other=0.0), 0.0)
        column = block * N + tl.arange(0, N)
        tl.store(g.norm_weight + column, tl.sum(tl.reshape(products, [S.KP, N]), axis=0), mask=column < S.C)


@triton.jit
def reduce_vector(block, sums, gradient, programs, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """N columns of the gradient of a weight or bias [d], in its own dtype."""
    d: tl.constexpr = S.M * S.C
    column = block * N + tl.arange(0, N)
    total = over_programs(sums, d, column, column < d, programs, P)
    tl.store(gradient + column, total.to(gradient.dtype.element_ty), mask=column < d)


@triton.jit
def reduce_tables(partial, g, programs, S: tl.constexpr, P: tl.constexpr):
    """Gradients of what is no longer than the coefficients."""
    e = tl.arange(0, S.N * S.KP)
    i, k = e // S.KP, e % S.KP
    table = over_programs(partial.table, S.N * S.KP, e, e >= 0, programs, P)
    tl.store(g.static_beta + i, table, mask=k == 0)
    tl.store(g.static_gamma + i * S.M + k - 1, table, mask=(k >= 1) & (k <= S.M))
    tl.store(g.static_alpha + i * S.N + k - 1 - S.M, table, mask=(k > S.M) & (k <= S.M + S.N))
    if partial.scaled is not None:
        k = tl.arange(0, S.KP)
        scaled = over_programs(partial.scaled, S.KP, k, k >= 0, programs, P)
        if g.scale_beta is not None:
            tl.store(g.scale_beta, tl.sum(tl.where(k == 0, scaled, 0.0), axis=0))
        if g.scale_alpha is not None:
            tl.store(g.scale_alpha, tl.sum(tl.where((k >= 1) & (k <= S.M + S.N), scaled, 0.0), axis=0))


@triton.jit
def reduce_kernel(
    partial, p, g, programs, S: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr
):
    """All gradients of parameters from the sums of so many programs.

    The first BLOCKS programs have N columns of the projection each, as many as WIDE columns cover d have the vectors,
    and the last one has the tables.
    """
    part = tl.program_id(0)
    vectors: tl.constexpr = (S.M * S.C + WIDE - 1) // WIDE
    if part < BLOCKS:
        if partial.projection is not None:
            reduce_projection(part, partial, p, g, programs, S, N, P)
    elif part < BLOCKS + vectors:
        if partial.weight is not None:
            reduce_vector(part - BLOCKS, partial.weight, g.weight, programs, S, WIDE, P)
        if partial.bias is not None:
            reduce_vector(part - BLOCKS, partial.bias, g.bias, programs, S, WIDE, P)
        if partial.output_bias is not None:
            reduce_vector(part - BLOCKS, partial.output_bias, g.output_bias, programs, S, WIDE, P)
    elif partial.table is not None:
        reduce_tables(partial, g, programs, S, P)
