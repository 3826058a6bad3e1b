"""A site as the arguments of an operation: tensors and plain values, which is all that torch.compile passes on."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.config import FracConfig, HyperConfig, ManifoldConfig, Norm
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.per_slot import PerSlotParameters
from megatron_fc.errors import UserError

N_PARAMETERS = len(PerSlotParameters._fields)


class Operands(NamedTuple):
    """What an operation needs of a site with coefficients per slot: its parameters, None for those it does not have.

    And its options; n, m, and what is dynamic, are in the parameters' shapes. The order is that of the operations'
    schemas, in which a site is these values one after another.
    """

    static_beta: Tensor
    static_gamma: Tensor
    static_alpha: Tensor
    dynamic_weight: Tensor | None
    scale_beta: Tensor | None
    scale_alpha: Tensor | None
    norm_weight: Tensor | None
    fractions: int
    norm: Norm
    tanh: bool
    norm_eps: float

    @classmethod
    def of(cls, p: PerSlotParameters, config: FracConfig | HyperConfig) -> "Operands":
        return cls(*p, config.fractions, config.norm, config.tanh, config.norm_eps)

    @property
    def parameters(self) -> PerSlotParameters:
        return PerSlotParameters._make(self[:N_PARAMETERS])

    @property
    def slots(self) -> int:
        return self.static_beta.shape[0]


N_OPERANDS = len(Operands._fields)


class ManifoldOperands(NamedTuple):
    """The same of a site with coefficients on a manifold."""

    mapping_weight: Tensor
    mapping_bias: Tensor
    mapping_scale: Tensor
    slots: int
    fractions: int
    sinkhorn_iterations: int
    sinkhorn_eps: float
    norm_eps: float

    @classmethod
    def of(cls, p: ManifoldParameters, config: ManifoldConfig) -> "ManifoldOperands":
        options = (config.sinkhorn_iterations, config.sinkhorn_eps, config.norm_eps)
        return cls(*p, config.slots, config.fractions, *options)

    @property
    def parameters(self) -> ManifoldParameters:
        return ManifoldParameters(self.mapping_weight, self.mapping_bias, self.mapping_scale)


AnyOperands = Operands | ManifoldOperands


class Projected(NamedTuple):
    """What coefficients on a manifold are made from, once the stream's part is done: small tensors, in fp32.

    Attributes:
        product: <W, stream> [K, T], K = n*m + n + n*n; or [2K, T], that of W's upper halves and that of its lower ones.
        norm: of each token's stream, [T].
        bias, scale: `mapping_bias` [K] and `mapping_scale` [3].
        width: of the stream, n*c.
        slots, fractions: n and m.
        iterations, eps: of Sinkhorn.
        norm_eps: of the stream's norm.
    """

    product: Tensor
    norm: Tensor
    bias: Tensor
    scale: Tensor
    width: int
    slots: int
    fractions: int
    iterations: int
    eps: float
    norm_eps: float

    @property
    def in_halves(self) -> bool:
        return self.product.shape[0] > self.bias.shape[0]

    def product_gradient(self) -> Tensor:
        """Room for the gradient of <W, stream>, [K, T] in fp32, or of halves [3K, T]: upper, upper, lower."""
        rows, tokens = self.bias.shape[0], self.norm.shape[0]
        if self.in_halves:
            return self.norm.new_empty(3 * rows, tokens, dtype=torch.bfloat16)
        return self.norm.new_empty(rows, tokens)


def refuse_double(p: AnyOperands) -> None:
    """Check that no parameter is in fp64, which the kernels cannot read.

    Raises:
        UserError: one is.
    """
    for name, value in zip(p.parameters._fields, p.parameters, strict=True):
        if value is not None and value.dtype == torch.float64:
            raise UserError(
                f"{name} of a connection is {value.dtype}, and the kernels compute in fp32: use connection.float() or "
                f"backend=torch"
            )


def refuse_low_precision(p: AnyOperands) -> None:
    """Check that parameters are in fp32 or fp64; a forward pass calls this.

    Raises:
        UserError: one has 16 bits: somebody has gone around `Fp32Parameters`.
    """
    parameters = p.parameters
    for name, value in zip(parameters._fields, parameters, strict=True):
        if value is not None and value.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name} of a connection is {value.dtype}, too coarse for what it learns: keep its parameters in fp32 "
                f"(connection.float(); with FSDP2 leave them to ignored_params)"
            )
