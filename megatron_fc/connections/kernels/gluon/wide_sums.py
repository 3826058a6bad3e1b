"""Sums over tokens of a program, for the projection's gradient and that of the sub-layer norm's weight, by chunks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.by_columns import again
from megatron_fc.connections.kernels.gluon.rows import inside, places, row_of_projection


@gluon.jit
def no_sums(S: gl.constexpr):
    """Of a program, by chunks: for the projection [W, 64, KP] and the sub-layer norm's weight [W, M, 64]."""
    CHUNKS: gl.constexpr = S.CHUNKS
    projection = ()
    weight = ()
    for _ in gl.static_range(CHUNKS):
        projection = projection + (gl.zeros([S.W, S.K, S.KP], gl.float32, layouts.products(S.W)),)
        weight = weight + (gl.zeros([S.W, S.M, S.K], gl.float32, layouts.columns(S.W, S.M)),)
    return projection, weight


@gluon.jit
def over_rows(memory, Z_s, total, S: gl.constexpr):
    """total [W, 64, KP] + what a chunk of h adds to the projection's gradient."""
    RIGHT: gl.constexpr = layouts.right(S.W)
    rows = again(memory.permute([0, 2, 1]), 2, 16, layouts.left(S.W))
    for first in gl.static_range(0, 2 * S.R, 16):
        z = Z_s.slice(first, 16, dim=0).load(gl.SliceLayout(0, RIGHT))[None, :, :]
        total = mma_v2(rows, z.broadcast_to([S.W, 16, S.KP]), total)
    return total


@gluon.jit
def store_sums(partial, d_projection, d_weight, S: gl.constexpr):
    """A program's sums for the projection and the sub-layer norm's weight."""
    CHUNKS: gl.constexpr = S.CHUNKS
    L: gl.constexpr = layouts.products(S.W)
    program = gl.program_id(0)
    warp = gl.arange(0, S.W, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    column = warp * S.K + gl.arange(0, S.K, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    k = gl.arange(0, S.KP, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    for n in gl.static_range(CHUNKS):
        if partial.projection is not None:
            row = program * (1 + S.M + S.N) + row_of_projection(k, S)
            mask = inside(k, column, n, 1 + S.M + S.N, S)
            gl.store(partial.projection + row * S.C + n * (S.W * S.K) + column, d_projection[n], mask=mask)
        if partial.weight is not None:
            fraction, own = places(S.M, layouts.columns(S.W, S.M), S)
            at = (program * S.M + fraction) * S.C + n * (S.W * S.K) + own
            gl.store(partial.weight + at, d_weight[n], mask=inside(fraction, own, n, S.M, S))
