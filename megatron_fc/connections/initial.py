"""Random initial values from a stream of their own."""

import torch
from torch import Tensor, nn


def xavier_uniform_(weight: Tensor, seed: int | None) -> None:
    """Fill a matrix as `torch.nn.init.xavier_uniform_` does, drawn on the CPU: the same on every device.

    Args:
        weight: the matrix.
        seed: of a generator made for it; None takes torch's own generator, as other modules do.
    """
    if weight.is_meta:
        return
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    drawn = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    weight.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
