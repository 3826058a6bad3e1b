"""Bytes that the operations have to move, by the formula of docs/kernels.md: rows of d elements per token, plus terms.

The terms, all in fp32: per token beta and its gradient (m values each) and alpha (m*m); once, the parameters, and in
backward their gradients too. Partial sums of gradients, a row per program, are how our kernels do it and not counted.
"""

from typing import NamedTuple

import torch

from megatron_fc import FracConfig


class Bytes(NamedTuple):
    forward: int
    backward: int


class Rows(NamedTuple):
    """Rows of d per token, read and written."""

    forward: int
    backward: int


OPERATIONS = {
    "layer": Rows(9, 13),
    "boundary": Rows(4, 6),
    "width+norm": Rows(2, 4),
    "depth": Rows(3, 3),
    "width": Rows(2, 4),
}
_LAYER = ("width+norm", "boundary", "depth")
TWO_OPERATIONS = Rows(10, 14)  # a layer without the boundary
# Megatron's bias-dropout-add and norm, and in backward autograd's sum at the residual.
STOCK = {
    "width+norm": Rows(2, 3),
    "depth": Rows(3, 0),
    "boundary": Rows(5, 6),
    "layer": Rows(10, 12),
}
# The same with that sum inside the norm's backward: what fused_residual_rmsnorm fuses in megatron-core 0.19.
FUSED_RESIDUAL = {
    "width+norm": Rows(2, 4),
    "boundary": Rows(5, 4),
    "layer": Rows(10, 8),
}
# (m)HC with 4 streams of width d, each tensor moved once, per layer.
FOUR_STREAMS = Rows(20, 30)


def rows_bytes(rows: Rows, width: int, tokens: int, dtype: torch.dtype) -> Bytes:
    """Bytes of the streams alone."""
    row = width * dtype.itemsize * tokens
    return Bytes(rows.forward * row, rows.backward * row)


def operation_bytes(
    operation: str, config: FracConfig, width: int, tokens: int, dtype: torch.dtype, rows: Rows | None = None
) -> Bytes:
    """Bytes of a Frac-Connection's operation: streams and terms."""
    beta, alpha = 4 * config.rate * tokens, 4 * config.rate**2 * tokens
    norm = width * dtype.itemsize
    parameters = 4 * config.parameter_count(width)
    normed = parameters + norm
    terms = {
        "width": Bytes(beta + alpha + parameters, beta + 2 * parameters),
        "width+norm": Bytes(beta + alpha + normed, beta + 2 * normed),
        "depth": Bytes(beta + alpha, 2 * beta),
        "boundary": Bytes(2 * (beta + alpha) + normed, 3 * beta + 2 * normed),
    }
    # A boundary has the terms of a depth and a width connection.
    terms["layer"] = Bytes(*(sum(parts) for parts in zip(*(terms[o] for o in _LAYER), strict=True)))
    streams = rows_bytes(rows or OPERATIONS[operation], width, tokens, dtype)
    return Bytes(*(sum(parts) for parts in zip(streams, terms[operation], strict=True)))
