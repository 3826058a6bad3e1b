"""The parameters that connections add to a Megatron model: their marks, and the source of their random values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fc.megatron.refusals import training_args, uses_matrix_optimizer


def mark_parameters(module: Any, config: TransformerConfig) -> None:
    """Mark a connection's parameters as Megatron's optimizers and gradient reductions have to know them."""
    to_adam = uses_matrix_optimizer(training_args())
    for parameter in module.parameters():
        # Under sequence parallelism every rank sees its tokens only: Megatron then sums these gradients.
        parameter.sequence_parallel = config.sequence_parallel
        if parameter.dim() == 2 and to_adam:
            # Coefficients are no linear map to be orthogonalised: Muon leaves what is marked so to Adam.
            parameter.is_embedding_or_output_parameter = True


def network_seed() -> int:
    """The seed of a model's random initial values, the same on all ranks of Megatron's training loop."""
    args = training_args()
    return torch.initial_seed() if args is None else int(args.seed)


@contextmanager
def without_drawing() -> Iterator[None]:
    """Leave torch's generator as it was: what is drawn inside is drawn again from a stream of its own."""
    with torch.random.fork_rng(devices=[]):
        yield
