"""A site as the arguments of an operation: tensors and plain values, which is all that torch.compile passes on."""

from typing import NamedTuple

from torch import Tensor

from megatron_fc.connections.config import FracConfig, Norm
from megatron_fc.connections.reference import FracParameters

N_PARAMETERS = len(FracParameters._fields)


class Operands(NamedTuple):
    """What an operation needs of a site: its parameters, None for those it does not have, and its options.

    The order is that of the operations' schemas, in which a site is these values one after another.
    """

    static_beta: Tensor
    static_gamma: Tensor
    static_alpha: Tensor
    dynamic_weight: Tensor | None
    scale_beta: Tensor | None
    scale_alpha: Tensor | None
    norm_weight: Tensor | None
    rate: int
    norm: Norm
    tanh: bool
    norm_eps: float

    @classmethod
    def of(cls, p: FracParameters, config: FracConfig) -> "Operands":
        return cls(*p, config.rate, config.norm, config.tanh, config.norm_eps)

    @property
    def parameters(self) -> FracParameters:
        return FracParameters._make(self[:N_PARAMETERS])


N_OPERANDS = len(Operands._fields)
