"""Recompute: keep the inputs of a function for backward and compute the rest again."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed[Result](function: Callable[..., Result], *tensors: Tensor) -> Result:
    """Call `function(*tensors)`; what autograd would keep inside is computed again in backward, from `tensors` alone.

    Non-reentrant, so that a parameter's gradient is still accumulated once per backward pass, which sharded gradients
    rely on. Random numbers are not restored: the function must not draw any.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    result: Result = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return result
