"""NormOverHeads: RMSNorm of queries or keys over all heads at once, as OLMoE and OLMo2 have it.

Megatron norms every head by itself, with one weight of a head's width. Here the root mean square is that of all heads
of a token, and each has a weight of its own: heads * head_size of them. Source: OLMoE, arXiv 2409.02060, section 2;
`transformers.models.olmoe` is the oracle of the tests.

Under tensor parallelism a rank has some of the heads. The sums of squares are added up over the group in forward, one
number per token and norm, and another in backward: for a layer 4 all-reduces of 4 * sequence * micro-batch bytes, which
are small and wait for each other. Every rank holds the whole weight and uses its heads' part: Megatron sums the
gradients of what is called `q_layernorm` and `k_layernorm` over the group in any case, and checkpoints hold one tensor.
"""

from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class NormOverHeads(nn.Module):
    """A builder for the slots `q_layernorm` and `k_layernorm` of Megatron's self-attention.

    Args:
        config: of the model.
        hidden_size: of a head.
        eps: added to the mean square.
        of: what is normed.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, of: Literal["queries", "keys"]):
        super().__init__()
        groups = config.num_query_groups or config.num_attention_heads
        self.heads = config.num_attention_heads if of == "queries" else groups
        self.head_size = hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.heads * hidden_size))
        self._ranks = config.tensor_model_parallel_size
        # Ranks that hold the same head, where there are more ranks than heads.
        self._copies = max(1, self._ranks // self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's heads [sequence, batch, heads, head_size] -> the same, normed, in their dtype."""
        if self._ranks == 1:
            return _OverHeads.apply(x, self.weight, self.eps, self.heads * self.head_size, None)
        group = parallel_state.get_tensor_model_parallel_group()
        first = group.rank() * self.heads // self._ranks
        own = self.weight[first * self.head_size : (first + x.shape[-2]) * self.head_size]
        # A head that several ranks hold is in the sum as often.
        return _OverHeads.apply(x, own, self.eps, self.heads * self.head_size * self._copies, group)


class _OverHeads(torch.autograd.Function):
    """y = x w / sqrt(sum(x^2) / width + eps); the sum goes over the heads of all ranks. Keeps x and the root."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int, group: Any) -> Tensor:
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        if group is not None:
            torch.distributed.all_reduce(squares, group=group)
        root = torch.rsqrt(squares / width + eps)
        ctx.save_for_backward(x, weight, root)
        ctx.width, ctx.group = width, group
        return (wide * root * weight.float().view(x.shape[-2:])).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, root = ctx.saved_tensors
        normed = x.float() * root
        gradient = gradient.float()
        of_weight = (gradient * normed).sum((0, 1)).flatten().to(weight.dtype)
        gradient = gradient * weight.float().view(x.shape[-2:])
        along = (gradient * normed).sum((-2, -1), keepdim=True)
        if ctx.group is not None:
            torch.distributed.all_reduce(along, group=ctx.group)
        of_x = root * (gradient - normed * (along / ctx.width))
        return of_x.to(x.dtype), of_weight, None, None, None
