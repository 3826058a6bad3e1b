"""Layouts of the main kernels: which warp, lane and register holds which element. All are known to the compiler."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def products(W):
    """Of results [W, 16, columns] of tensor cores: a warp has all 16 rows of its own columns."""
    return gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def left(W):
    """Of the operand of a product whose rows are the result's."""
    return gl.DotOperandLayout(0, products(W), 2)


@gluon.constexpr_function
def right(W):
    """Of the operand whose columns are the result's."""
    return gl.DotOperandLayout(1, products(W), 2)


@gluon.constexpr_function
def copies(W):
    """[W, rows, 64]: a warp copies 16 bytes per lane, 4 rows at a time."""
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [W, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def quads(W):
    """[W, 16, 64]: 16 bytes of a row in each of four lanes, between which results of tensor cores come to it."""
    regs = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 32], [0, 8, 0]]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(regs, lanes, [[1 << b, 0, 0] for b in range(log2(W))], [], [W, 16, 64])


@gluon.constexpr_function
def columns(W, rows):
    """[W, rows, 64]: a lane has two columns of every row."""
    return mixing(W, [rows])


@gluon.constexpr_function
def mixing(W, shape):
    """[W, *shape, 64] with two columns in each lane, and there all that `shape` counts."""
    rank = len(shape) + 2

    def unit(axis, size):
        return [size if a == axis else 0 for a in range(rank)]

    rows = [(axis + 1, 1 << b) for axis in reversed(range(len(shape))) for b in range(log2(shape[axis]))]
    registers = [unit(rank - 1, 1), *(unit(axis, size) for axis, size in rows)]
    lanes = [unit(rank - 1, 2 << b) for b in range(5)]
    warps = [unit(0, 1 << b) for b in range(log2(W))]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [W, *shape, 64])


@gluon.constexpr_function
def tables(shape, lanes, warps, W):
    """A layout of `shape`. `lanes`, `warps`: (axis, first bit, bits) of indices, given out in order to lanes and warps.

    What finds no lane or warp is in registers; what is left of lanes or warps, and those of axis -1, hold copies.
    """
    rank = len(shape)

    def bits(wanted):
        return [(axis, bit) for axis, first, n in wanted for bit in range(first, first + n)]

    def unit(axis, bit):
        return [(1 << bit) if a == axis else 0 for a in range(rank)]

    def padded(given, n):
        return [unit(*bit) for bit in given] + [[0] * rank] * (n - len(given))

    of_warps = bits(warps)
    given_warps, rest = of_warps[: log2(W)], of_warps[log2(W) :]
    given_lanes = (bits(lanes) + rest)[:5]
    taken = {*given_warps, *given_lanes}
    every = [(axis, bit) for axis in reversed(range(rank)) for bit in range(log2(shape[axis]))]
    registers = [unit(*bit) for bit in every if bit not in taken]
    return gl.DistributedLinearLayout(registers, padded(given_lanes, 5), padded(given_warps, log2(W)), [], list(shape))


@gluon.constexpr_function
def of_columns(axis, N, columns):
    """Lanes for the columns of a table along an axis: N, of which some hold copies, so that slots always come next."""
    n, k = log2(N), log2(columns)
    return [(axis, 0, min(n, k)), (-1, 0, max(0, n - k))]


@gluon.constexpr_function
def over_warps(N, W, R, columns):
    """[W, R, columns]: tables of all warps, read by one warp per token (or few); the sum over W is in registers."""
    n, t = log2(N), log2(R) - log2(N)
    return tables([W, R, columns], [*of_columns(2, N, columns), (1, 0, n)], [(1, n, t)], W)


@gluon.constexpr_function
def table(N, W, R, columns):
    """[R, columns]: a token per warp, a coefficient per lane."""
    return gl.SliceLayout(0, over_warps(N, W, R, columns))


@gluon.constexpr_function
def by_token(N, W, R, columns):
    """[R / N, N, columns]: a table with an axis for tokens."""
    n = log2(N)
    return tables([R // N, N, columns], [*of_columns(2, N, columns), (1, 0, n)], [(0, 0, log2(R) - n)], W)


@gluon.constexpr_function
def summed(N, W, R, columns, axis):
    """[R / N, N, N, columns] with `axis`, over which a product of tables sums, in registers; [R / N, N, N, N] where
    that is the last one.
    """
    n = log2(N)
    last = columns if axis == 2 else N
    shape = [R // N, N, N, last]
    return tables(shape, [*of_columns(5 - axis, N, last), (1, 0, n)], [(0, 0, log2(R) - n)], W)


@gluon.constexpr_function
def blocks(M, W, R):
    """[R, R / M, M]: a matrix [R, R] by its blocks of a token, of which those on the diagonal are written first."""
    m = log2(M)
    return tables([R, R // M, M], [(2, 0, m), (0, 0, m), (1, 0, log2(R) - m)], [(0, m, log2(R) - m)], W)


@gluon.constexpr_function
def everywhere(W, R):
    """[R] in the registers of every thread."""
    return gl.DistributedLinearLayout([[1 << b] for b in range(log2(R))], [[0]] * 5, [[0]] * log2(W), [], [R])


@gluon.constexpr_function
def row_everywhere(W, R):
    """[1, R] in the same way."""
    return gl.DistributedLinearLayout(
        [[0, 1 << b] for b in range(log2(R))], [[0, 0]] * 5, [[0, 0]] * log2(W), [], [1, R]
    )


@gluon.constexpr_function
def rows_in_memory():
    """Of chunks in shared memory: no bank is asked twice by a matrix load, as rows lie or transposed."""
    return gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])


@gluon.constexpr_function
def matrix_in_memory():
    """Of matrices [R, R or KP] of 16 bits."""
    return gl.SwizzledSharedLayout(8, 4, 2, [1, 0])


@gluon.constexpr_function
def plain(rank):
    """Of shared memory in the order of its elements."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(reversed(range(rank))))
