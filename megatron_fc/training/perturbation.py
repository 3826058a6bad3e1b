"""First weights moved by a ten-millionth of themselves: how far apart such runs end is how far rounding moves one.

Sums in another order, as on another machine, differ by as much.
"""

import zlib
from argparse import Namespace
from typing import Any

import torch

from megatron_fc.callbacks import Callback
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount

SIZE = 1e-7  # about a rounding in fp32


class Perturbation(Callback):
    """Multiplies every first weight by 1 + 1e-7 x, x normal. A run that goes on from a checkpoint loads over it.

    The numbers come from the run's `perturbation` and the parameter's name, so that replicas stay equal.

    Args:
        number: of the perturbation, from 1 on.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def arguments_valid(self, args: Namespace) -> None:
        """Check that weights can change by so little, and in one place.

        Raises:
            UserError: they cannot.
        """
        if args.bf16 or args.fp16:
            raise UserError(f"perturbation={self._number} is below the rounding of 16 bits: set bf16=false, fp16=false")
        if args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights:
            raise UserError(
                f"perturbation={self._number} would part the tied embeddings of the first and last pipeline stage: "
                f"set untie_embeddings_and_output_weights=true or pipeline_model_parallel_size=1"
            )

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{self._number} {name}".encode()))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                with torch.no_grad():
                    parameter.mul_(1 + SIZE * noise)
        return chunks
