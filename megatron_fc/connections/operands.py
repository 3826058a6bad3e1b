"""A site as the arguments of an operation: tensors and plain values, which is all that torch.compile passes on."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fc.connections.config import FracConfig, Norm
from megatron_fc.connections.reference import FracParameters
from megatron_fc.errors import UserError

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

    def refuse_low_precision(self) -> None:
        """Check that parameters are in fp32 or fp64; a forward pass calls this.

        Raises:
            UserError: one has 16 bits: somebody has gone around `FracConnection._apply`.
        """
        p = self.parameters
        for name, value in zip(p._fields, p, strict=True):
            if value is not None and value.dtype not in (torch.float32, torch.float64):
                raise UserError(
                    f"{name} of a Frac-Connection is {value.dtype}, too coarse for what it learns: keep its "
                    f"parameters in fp32 (connection.float(); with FSDP2 leave them to ignored_params)"
                )

    @property
    def parameters(self) -> FracParameters:
        return FracParameters._make(self[:N_PARAMETERS])


N_OPERANDS = len(Operands._fields)
