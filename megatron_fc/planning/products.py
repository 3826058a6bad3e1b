"""A product of matrices as an operation: FLOPs with those that tiles waste, bytes with those of quantisation."""

from math import ceil
from typing import NamedTuple

from megatron_fc.planning.activations import OPERAND_BYTES
from megatron_fc.planning.shape import Training

_TILE = 256  # of a product's result on Hopper and Blackwell


class Pass(NamedTuple):
    """One pass of an operation.

    Attributes:
        flops: of it.
        bytes: read and written.
        wasted: FLOPs on what tiles have beyond the sides of a product, or beyond what a token attends to.
    """

    flops: float = 0.0
    bytes: float = 0.0
    wasted: float = 0.0


class Operation(NamedTuple):
    """An operation of a layer on one rank and micro-batch.

    Attributes:
        name: of it.
        forward, backward: its passes.
        is_linear: its products run in FP8 or FP4 where the model's do.
        exponentials: of the forward pass; backward has as many.
        again_with: modules of selective recompute that run its forward pass again.
        kernels: that the host launches for the forward pass; backward has twice as many.
        module: of Megatron's CUDA graphs, which captures these launches.
    """

    name: str
    forward: Pass
    backward: Pass
    is_linear: bool = False
    again_with: tuple[str, ...] = ()
    kernels: int = 1
    module: str = ""
    exponentials: float = 0.0


def product(
    name: str,
    rows: float,
    inner: float,
    outer: float,
    training: Training,
    matrices: int = 1,
    again_with: tuple[str, ...] = (),
) -> Operation:
    """rows x inner times inner x outer, the rows dealt out to `matrices` of them.

    Backward reads the gradient twice, input and weight once each, writes the input's gradient and adds to the weight's.
    """
    e, weight = training.element_bytes, inner * outer * matrices
    operand = OPERAND_BYTES.get(training.products, e)
    flops = 2 * rows * inner * outer
    forward = operand * (rows * inner + weight) + e * rows * outer
    backward = operand * (rows * inner + weight + 2 * rows * outer) + e * rows * inner
    backward += 2 * training.gradient_bytes * weight
    kernels = matrices
    if training.products != "half":
        # What comes in is read and written by rows and by columns: at once, or the columns from the rows. One scale for
        # a whole tensor needs its largest value first.
        quantised = e * (1 + training.tensor_scales) + (3 if training.transposes else 2) * operand
        forward += quantised * rows * inner
        backward += quantised * rows * outer
        kernels += 1 + training.tensor_scales + training.transposes
    # Forward's result has sides of rows and outer, the input's gradient of rows and inner, the weight's of both others.
    by_rows, by_inner, by_outer = _tiled(rows / matrices), _tiled(inner), _tiled(outer)
    wasted = flops * (by_rows * by_outer - 1), flops * (by_rows * by_inner + by_inner * by_outer - 2)
    return Operation(
        name, Pass(flops, forward, wasted[0]), Pass(2 * flops, backward, wasted[1]), True, again_with, kernels
    )


def _tiled(side: float) -> float:
    """A side in whole tiles, over the side."""
    return ceil(side / _TILE) * _TILE / side
