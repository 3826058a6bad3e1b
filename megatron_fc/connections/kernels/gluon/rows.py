"""Rows of a tile in shared memory: asynchronous copies, the projection, products with matrices, what is not finite.

A tile is R = 16 rows, the fractions of 16 / M tokens. It is in chunks [W, R, 64]: each of W warps owns 64 columns of
every chunk, and copies, reads and writes no others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.tables import is_finite


@gluon.jit
def places(ROWS: gl.constexpr, L: gl.constexpr, S: gl.constexpr):
    """Row [1, ROWS, 1] and column [W, 1, 64] of the first chunk's elements in a layout of [W, ROWS, 64]."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    warp = gl.arange(0, S.W, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    return row, warp * S.K + gl.arange(0, S.K, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]


@gluon.jit
def inside(row, column, n, count, S: gl.constexpr):
    """Which elements of chunk n exist, for `count` rows and their first chunk's columns."""
    if S.C % (S.W * S.K) == 0:
        return row + 0 * column < count
    return (row < count) & (column < S.C - n * (S.W * S.K))


@gluon.jit
def copy_chunk(memory, pointer, n: gl.constexpr, first, count, S: gl.constexpr):
    """Ask for chunk n of as many rows from `first` on as `memory` has; what lies outside becomes zero."""
    row, column = places(memory.shape[1], layouts.copies(S.W), S)
    pointer += first.to(gl.int64) * S.C + n * (S.W * S.K)
    mask = inside(row, column, n, count - first, S)
    async_copy.async_copy_global_to_shared(memory, pointer + row * S.C + column, mask=mask)


@gluon.jit
def copy_values(memory, pointer, first, count, SIZE: gl.constexpr, S: gl.constexpr):
    """Ask for SIZE values in fp32 from `first` on."""
    at = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [S.W], [0]))
    async_copy.async_copy_global_to_shared(memory, pointer + first + at, mask=at < count - first)


@gluon.jit
def row_of_projection(k, S: gl.constexpr):
    """The row of the projection that column k of a product with it belongs to.

    Here alpha comes first, then gamma and beta: parts of shared memory begin at multiples of their size.
    """
    return gl.where(k < S.N, 1 + S.M + k, gl.where(k < S.M + S.N, 1 - S.N + k, 0))


@gluon.jit
def keep_projection(memory, p, S: gl.constexpr):
    """The projection with the slot norm's weight folded in, [CHUNKS, W, rows, 64] in 16 bits, once per program."""
    CHUNKS: gl.constexpr = S.CHUNKS
    k, column = places(memory.shape[2], layouts.copies(S.W), S)
    for n in gl.static_range(CHUNKS):
        at = n * (S.W * S.K) + column
        mask = inside(k, column, n, 1 + S.M + S.N, S)
        weight = gl.load(p.dynamic_weight + row_of_projection(k, S) * S.C + at, mask=mask, other=0.0)
        if p.norm_weight is not None:
            weight *= gl.load(p.norm_weight + at, mask=inside(0, column, n, 1, S), other=0.0)
        memory.index(n).store(weight.to(memory.dtype))


@gluon.jit
def sub_norm_weight(norm, n: gl.constexpr, LIKE: gl.constexpr, S: gl.constexpr):
    """Chunk n of the sub-layer norm's weight for a token's rows, [W, 1, M, 64], in a layout LIKE of [W, R, 64]."""
    fraction, column = places(S.M, LIKE, S)
    mask = inside(fraction, column, n, S.M, S)
    weight = gl.load(norm.weight + fraction * S.C + n * (S.W * S.K) + column, mask=mask, other=0.0)
    like: gl.constexpr = by_tokens(gl.zeros([S.W, S.R, S.K], weight.dtype, LIKE), S).type.layout
    return gl.convert_layout(gl.reshape(weight, [S.W, 1, S.M, S.K]), like)


@gluon.jit
def by_tokens(rows, S: gl.constexpr):
    """[W, R, K] as [W, R / M, M, K]."""
    return gl.reshape(rows, [S.W, S.R // S.M, S.M, S.K])


@gluon.jit
def weighted(rows, weight, S: gl.constexpr):
    """Rows times the sub-layer norm's weight, rounded once, in the dtype of the rows."""
    factor = weight.to(gl.float32) + 1.0 if S.ONE_PLUS else weight.to(rows.dtype)
    return gl.reshape((by_tokens(rows, S) * factor).to(rows.dtype), [S.W, S.R, S.K])


@gluon.jit
def halves_of(memory, TRANSPOSED: gl.constexpr, S: gl.constexpr):
    """The two halves of a matrix as left operands, the same for every warp."""
    L: gl.constexpr = layouts.left(S.W)
    out = ()
    for half in gl.static_range(2):
        m = memory.index(half).permute([1, 0]) if TRANSPOSED else memory.index(half)
        a = m.load(gl.SliceLayout(0, L))[None, :, :]
        out = out + (a.broadcast_to([S.W, a.shape[1], a.shape[2]]),)
    return out


@gluon.jit
def mix(memory, rows, total, TRANSPOSED: gl.constexpr, S: gl.constexpr):
    """total + matrix rows; the matrix is in two halves."""
    high, low = halves_of(memory, TRANSPOSED, S)
    return mma_v2(low, rows, mma_v2(high, rows, total))


@gluon.jit
def by_rows(a, b, total, S: gl.constexpr):
    """total + a b^T, both left operands: products of rows."""
    return mma_v2(a, gl.convert_layout(gl.permute(b, [0, 2, 1]), layouts.right(S.W)), total)


@gluon.jit
def make_finite(memory, n, S: gl.constexpr):
    """Chunk n with zero for what is not finite."""
    values = memory.index(n).load(layouts.copies(S.W))
    memory.index(n).store(gl.where(is_finite(values.to(gl.float32)), values, 0.0).to(values.dtype))
