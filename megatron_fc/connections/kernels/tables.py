"""Tables [R, KP] of coefficients, a row per slot: beta, gamma_1..m, alpha_1..n, padding. From memory and back, and as
matrices [R, R] that mix the slots of a tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_fc.connections.kernels.tiles import same_token


class Given(NamedTuple):
    """Coefficients that come from elsewhere, and in backward where their gradients go, fp32; all None: there are none.

    gamma [T, n*m], alpha [T, n*n].
    """

    gamma: Tensor | None = None
    alpha: Tensor | None = None
    g_gamma: Tensor | None = None
    g_alpha: Tensor | None = None


@triton.jit
def from_table(table, FIRST: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """The matrix [R, R] of the coefficients in COUNT columns from FIRST on of a table, a column for the first so many
    slots: zero between tokens, and where there are fewer of them than slots.
    """
    index = tl.zeros([S.R, S.R], tl.int32) + (FIRST + tl.arange(0, S.R) % COUNT)[None, :]
    has = same_token(S)
    if COUNT < S.N:
        has = has & (tl.arange(0, S.R) % S.N < COUNT)[None, :]
    return tl.where(has, tl.gather(table, index, axis=1), 0.0)


@triton.jit
def to_table(matrix, FIRST: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """The reverse: a table [R, KP] with the coefficients of a matrix in these columns, else zero."""
    k = tl.arange(0, S.KP)[None, :]
    inside = (k >= FIRST) & (k < FIRST + COUNT)
    first_row = (tl.arange(0, S.R) // S.N * S.N)[:, None]
    index = tl.where(inside, first_row + k - FIRST, first_row + tl.zeros_like(k))
    return tl.where(inside, tl.gather(matrix, index, axis=1), 0.0)


@triton.jit
def static_table(p, S: tl.constexpr):
    """The static coefficients as a table."""
    i = (tl.arange(0, S.R) % S.N)[:, None]
    k = tl.arange(0, S.KP)[None, :]
    beta = tl.load(p.static_beta + i + 0 * k, mask=k < 1, other=0.0)
    gamma = tl.load(p.static_gamma + i * S.M + k - 1, mask=(k >= 1) & (k < 1 + S.M), other=0.0)
    alpha = tl.load(p.static_alpha + i * S.N + k - 1 - S.M, mask=(k > S.M) & (k < 1 + S.M + S.N), other=0.0)
    return beta + gamma + alpha


@triton.jit
def given_table(given, first, count, S: tl.constexpr):
    """Given coefficients of a tile's tokens as a table; zero where there are none, as of beta."""
    rows, k = first + tl.arange(0, S.R)[:, None], tl.arange(0, S.KP)[None, :]
    of_gamma, of_alpha = (k >= 1) & (k <= S.M), (k > S.M) & (k <= S.M + S.N)
    table = tl.load(given.gamma + rows * S.M + k - 1, mask=(rows < count) & of_gamma, other=0.0)
    if given.alpha is not None:
        table += tl.load(given.alpha + rows * S.N + k - 1 - S.M, mask=(rows < count) & of_alpha, other=0.0)
    return table


@triton.jit
def scales(p, S: tl.constexpr):
    """The scale of each column of a table, [KP]; 1 without one."""
    beta, alpha = 1.0, 1.0
    if p.scale_beta is not None:
        beta = tl.load(p.scale_beta)
    if p.scale_alpha is not None:
        alpha = tl.load(p.scale_alpha)
    return tl.where(tl.arange(0, S.KP) == 0, beta, alpha)


@triton.jit
def tanh(z):
    """Without a library call, which the interpreter lacks; the series keeps small values accurate."""
    square = z * z
    series = z * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.04, series, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def store_coefficients(table, beta, alpha, first, count, S: tl.constexpr):
    rows = first + tl.arange(0, S.R)
    k = tl.arange(0, S.KP)[None, :]
    valid = rows < count
    tl.store(beta + rows, tl.sum(tl.where(k == 0, table, 0.0), axis=1), mask=valid)
    inside = (k > S.M) & (k < 1 + S.M + S.N)
    tl.store(alpha + rows[:, None] * S.N + (k - 1 - S.M), table, mask=valid[:, None] & inside)


@triton.jit
def store_given_gradients(table, given, first, count, S: tl.constexpr):
    rows, k = first + tl.arange(0, S.R)[:, None], tl.arange(0, S.KP)[None, :]
    of_gamma, of_alpha = (k >= 1) & (k <= S.M), (k > S.M) & (k <= S.M + S.N)
    if given.g_gamma is not None:
        tl.store(given.g_gamma + rows * S.M + k - 1, table, mask=(rows < count) & of_gamma)
    if given.g_alpha is not None:
        tl.store(given.g_alpha + rows * S.N + k - 1 - S.M, table, mask=(rows < count) & of_alpha)
