"""Parameters that no cast lowers below fp32."""

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn


class Fp32Parameters(nn.Module):
    """A module whose parameters are fp32 or wider in every model.

    Megatron's Float16Module casts by module.bfloat16(). Just above 1 bf16 steps by 0.0078, coarser than what
    coefficients learn, so the parameters follow moves to other devices and upcasts, and never fall below fp32.
    """

    def register_parameters(self, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Register the parameters of these shapes, uninitialised, and None for names that have none."""
        for name in names:
            # The dtype is explicit, since frameworks build models under a default of bf16.
            values = torch.empty(shapes[name], dtype=torch.float32) if name in shapes else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            too_coarse = moved.is_floating_point() and moved.dtype.itemsize < torch.float32.itemsize
            return tensor.to(moved.device) if too_coarse else moved

        # Leaving the meta device makes new parameters, without what frameworks have marked on the old ones: Megatron's
        # `sequence_parallel`, say, whose loss would leave gradients unreduced.
        marks = {name: vars(p).copy() for name, p in self._parameters.items() if p is not None}
        super()._apply(keep_precision, recurse)
        for name, attributes in marks.items():
            vars(self._parameters[name]).update(attributes)
        return self
