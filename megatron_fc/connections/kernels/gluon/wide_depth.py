"""Depth connection of wide slots alone, a token at a time: rounded as `gluon.wide_forward` does in a boundary."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megatron_fc.connections.kernels.gluon import layouts
from megatron_fc.connections.kernels.gluon.by_columns import (
    for_turns,
    fractions_of,
    from_slots,
    load_rows,
    rounded,
    store_rows,
    to_fp32,
)


@gluon.jit
def coefficients(pointer, first, COLUMNS: gl.constexpr, S: gl.constexpr):
    """A token's coefficients [1, 1, N, COLUMNS, 1], the same in all lanes."""
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(4, layouts.mixing(S.W, [1, S.N, COLUMNS])))
    i = gl.arange(0, S.N, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    k = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return gl.load(pointer + (first + i) * COLUMNS + k)[None, :, :, :, None]


@gluon.jit
def wide_depth_kernel(pre, out, count, S: gl.constexpr):
    """As `megatron_fc.connections.kernels.depth.depth_forward_kernel`."""
    CHUNKS: gl.constexpr = S.CHUNKS
    dtype: gl.constexpr = out.dtype.element_ty
    row = gl.arange(0, S.N, layout=gl.SliceLayout(0, gl.SliceLayout(2, layouts.columns(S.W, S.N))))
    for token in range(gl.program_id(0), count // S.N, gl.num_programs(0)):
        first = token * S.N
        alpha = coefficients(pre.alpha, first, S.N, S)
        beta = gl.load(pre.beta + first + row)[None, :, None]
        for n in gl.static_range(CHUNKS):
            made = from_slots(alpha, to_fp32(load_rows(pre.h, n, first, count, S.N, S)), S)
            o = load_rows(pre.o, n, fractions_of(first, S), fractions_of(count, S), S.M, S)
            made += beta * for_turns(to_fp32(o), S)
            store_rows(out, rounded(made, dtype), n, first, count, S)
