"""Slots mixed where they lie: a lane has two columns of all rows of a tile, and adds them up in fp32.

Tensor cores would mix slots, too, but want their matrices in two halves and their results brought into order. They take
the sums over columns, and those over rows that the projection's gradient is. A tile has R = 8 or 16 rows, as many as
shared memory leaves room for; where tensor cores want 16, a tile of 8 stands there twice.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.rows import inside, places


@gluon.jit
def chunks(dtype: gl.constexpr, ROWS: gl.constexpr, S: gl.constexpr):
    """Shared memory for all chunks of ROWS rows, each by itself: the compiler lets all warps wait for each other where
    one reads what another might be writing, and does not know that they own their columns.
    """
    CHUNKS: gl.constexpr = S.CHUNKS
    out = ()
    for _ in gl.static_range(CHUNKS):
        out = out + (gl.allocate_shared_memory(dtype, [S.W, ROWS, S.K], layouts.rows_in_memory()),)
    return out


@gluon.constexpr_function
def with_axis(shape, axis, size, own):
    """A shape with so many elements along an axis, in parts of `own` if that is not 0."""
    sizes = [size // own, own] if own else [size]
    return [*list(shape)[:axis], *sizes, *list(shape)[axis + 1 :]]


@gluon.constexpr_function
def projection_rows(S):
    """Rows of the projection in shared memory, a power of two."""
    return 4 if S.M + S.N < 4 else 8


@gluon.jit
def by_columns(rows, S: gl.constexpr):
    """[W, ..., 64] as [W, rows, 64]: registers get other names."""
    ROWS: gl.constexpr = rows.numel // (S.W * S.K)
    return gl.convert_layout(gl.reshape(rows, [S.W, ROWS, S.K]), layouts.columns(S.W, ROWS))


@gluon.jit
def table_for(memory, S: gl.constexpr):
    """A table [T, N, COLUMNS] in shared memory as [1, T, N, COLUMNS, 1], the same in all lanes."""
    T: gl.constexpr = S.R // S.N
    L: gl.constexpr = layouts.mixing(S.W, [T, S.N, memory.shape[2]])
    return memory.load(gl.SliceLayout(0, gl.SliceLayout(4, L)))[None, :, :, :, None]


@gluon.jit
def from_slots(table, rows, S: gl.constexpr):
    """Sum over slots i of table[t, i, k] rows[t, i], [W, T * COLUMNS, 64], for rows of slots."""
    T: gl.constexpr = S.R // S.N
    L: gl.constexpr = layouts.mixing(S.W, [T, S.N, table.shape[3]])
    rows = gl.convert_layout(gl.reshape(rows, [S.W, T, S.N, S.K]), gl.SliceLayout(3, L))
    return by_columns(gl.sum(table * gl.expand_dims(rows, 3), axis=2), S)


@gluon.jit
def each(rows, COUNT: gl.constexpr, S: gl.constexpr):
    """Rows [W, T * COUNT, 64] by what a token has COUNT of, for all its slots: COUNT times [W, T or 1, 1, 64]."""
    T: gl.constexpr = rows.shape[1] // COUNT
    L: gl.constexpr = gl.SliceLayout(2, layouts.mixing(S.W, [S.R // S.N, S.N]))
    if COUNT == 1:
        row = gl.convert_layout(gl.reshape(rows, [S.W, T, S.K]), L)
        out = (gl.expand_dims(row, 2),)
    else:
        parts = gl.reshape(rows, [S.W, T, 2, COUNT // 2, S.K])
        first, second = gl.split(gl.permute(parts, [0, 1, 3, 4, 2]))
        first = gl.reshape(first, [S.W, T * (COUNT // 2), S.K])
        second = gl.reshape(second, [S.W, T * (COUNT // 2), S.K])
        out = each(first, COUNT // 2, S) + each(second, COUNT // 2, S)
    return out


@gluon.jit
def of_slots(memory, k: gl.constexpr, S: gl.constexpr):
    """Row k of a table [columns, R] in shared memory, [1, T, N, 1], the same in all lanes."""
    T: gl.constexpr = S.R // S.N
    row = memory.slice(k, 1, dim=0).load(layouts.row_everywhere(S.W, S.R))
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, layouts.mixing(S.W, [T, S.N])))
    return gl.convert_layout(gl.reshape(row, [T, S.N]), L)[None, :, :, None]


@gluon.jit
def to_fp32(values):
    """16 bits in fp32: of bf16 two neighbours by one operation each, where the compiler takes three for both."""
    if values.dtype == gl.bfloat16:
        out = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [values],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        out = values.to(gl.float32)
    return out


@gluon.jit
def rounded(values, dtype: gl.constexpr):
    """fp32 in 16 bits, two neighbours at once. The compiler takes one at a time where it needs them again, and that at
    an eighth of the rate.
    """
    if dtype == gl.bfloat16:
        out = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        out = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=gl.float16, is_pure=True, pack=2
        )
    return out


@gluon.jit
def over_turns(rows, S: gl.constexpr):
    """Rows of slots summed to those of fractions, [W, T * M, 64]."""
    return by_columns(gl.sum(gl.reshape(rows, [S.W, S.R // S.N, S.N // S.M, S.M, S.K]), axis=2), S)


@gluon.jit
def for_turns(rows, S: gl.constexpr):
    """Rows of fractions for every slot that they belong to, [W, R, 64]."""
    T: gl.constexpr = S.R // S.N
    L: gl.constexpr = layouts.mixing(S.W, [T, S.N // S.M, S.M])
    rows = gl.convert_layout(gl.reshape(rows, [S.W, T, S.M, S.K]), gl.SliceLayout(2, L))
    return by_columns(gl.expand_dims(rows, 2).broadcast_to([S.W, T, S.N // S.M, S.M, S.K]), S)


@gluon.jit
def per_row(memory, S: gl.constexpr):
    """Values [R] in shared memory, [1, R, 1]."""
    return memory.load(gl.SliceLayout(0, gl.SliceLayout(2, layouts.columns(S.W, S.R))))[None, :, None]


@gluon.jit
def fractions_of(count, S: gl.constexpr):
    """Rows of sub-layers' inputs and outputs that go with so many rows of slots."""
    return count // S.N * S.M


@gluon.jit
def places_in_tile(n: gl.constexpr, first, count, ROWS: gl.constexpr, S: gl.constexpr):
    """Offsets of chunk n of ROWS rows from `first` on, and which of them are there: a token's rows all are, or none."""
    OF_TOKEN: gl.constexpr = ROWS * S.N // S.R
    row, column = places(ROWS, layouts.columns(S.W, ROWS), S)
    mask = inside(row // OF_TOKEN * OF_TOKEN, column, n, count - first, S)
    return first.to(gl.int64) * S.C + (row * S.C + column + n * (S.W * S.K)), mask


@gluon.jit
def load_rows(pointer, n: gl.constexpr, first, count, ROWS: gl.constexpr, S: gl.constexpr):
    """Chunk n of ROWS rows of a tile from `first` on, [W, ROWS, 64]; zero outside."""
    at, mask = places_in_tile(n, first, count, ROWS, S)
    return gl.load(pointer + at, mask=mask, other=0.0)


@gluon.jit
def store_rows(pointer, rows, n: gl.constexpr, first, count, S: gl.constexpr):
    """The reverse."""
    at, mask = places_in_tile(n, first, count, rows.shape[1], S)
    gl.store(pointer + at, rows, mask=mask)


@gluon.jit
def load_all(pointer, first, count, ROWS: gl.constexpr, S: gl.constexpr):
    """All chunks of ROWS rows from `first` on, in registers."""
    CHUNKS: gl.constexpr = S.CHUNKS
    out = ()
    for n in gl.static_range(CHUNKS):
        out = out + (load_rows(pointer, n, first, count, ROWS, S),)
    return out


@gluon.jit
def weight_of(pointer, n: gl.constexpr, S: gl.constexpr):
    """Chunk n of a weight [d], [W, M, 64] in its own dtype."""
    fraction, column = places(S.M, layouts.columns(S.W, S.M), S)
    mask = inside(fraction, column, n, S.M, S)
    return gl.load(pointer + fraction * S.C + n * (S.W * S.K) + column, mask=mask, other=0.0)


@gluon.jit
def for_tokens(weight, S: gl.constexpr):
    """[W, M, 64] for every token, [W, T * M, 64] in fp32, with the one that the norm leaves out."""
    T: gl.constexpr = S.R // S.N
    weight = gl.convert_layout(weight, gl.SliceLayout(1, layouts.mixing(S.W, [T, S.M])))
    weight = by_columns(gl.expand_dims(to_fp32(weight), 1).broadcast_to([S.W, T, S.M, S.K]), S)
    return weight + 1.0 if S.ONE_PLUS else weight


@gluon.jit
def again(memory, AXIS: gl.constexpr, SIZE: gl.constexpr, L: gl.constexpr):
    """[W, a, b] in shared memory with what it has along AXIS again and again, SIZE in all, in a layout L."""
    if memory.shape[AXIS] == SIZE:
        values = memory.load(L)
    else:
        whole: gl.constexpr = with_axis(memory.shape, AXIS, SIZE, 0)
        parts: gl.constexpr = with_axis(memory.shape, AXIS, SIZE, memory.shape[AXIS])
        like: gl.constexpr = gl.reshape(gl.zeros(whole, memory.dtype, L), parts).type.layout
        values = gl.expand_dims(memory.load(gl.SliceLayout(AXIS, like)), AXIS)
        values = gl.convert_layout(gl.reshape(values.broadcast_to(parts), whole), L)
    return values


@gluon.jit
def rows_of(memory, S: gl.constexpr):
    """Rows of a chunk as left operand of a product over columns, [W, 16, 64]."""
    return again(memory, 1, 16, layouts.left(S.W))


@gluon.jit
def columns_of(memory, S: gl.constexpr):
    """Rows of a chunk as right operand of a product over columns, [W, 64, rows], at least 8."""
    return again(memory.permute([0, 2, 1]), 2, max(8, memory.shape[1]), layouts.right(S.W))


@gluon.jit
def in_token(matrix, COLUMNS: gl.constexpr, OWN: gl.constexpr, S: gl.constexpr):
    """Of products of rows [W, 16, columns], those within a token, which has OWN of COLUMNS columns: [W, 16, OWN].

    Rows of a tile of 8 and columns behind COLUMNS stand there again.
    """
    r, k = gl.arange(0, 16) % S.R, gl.arange(0, matrix.shape[2])
    own = ((r // S.N)[None, :, None] == (k // OWN)[None, None, :]) & (k < COLUMNS)[None, None, :]
    matrix = gl.where(own, matrix, 0.0)
    return gl.sum(gl.reshape(matrix, [S.W, 16, matrix.shape[2] // OWN, OWN]), axis=2)
