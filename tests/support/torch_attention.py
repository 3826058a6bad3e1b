"""A core attention for tests: Megatron's own torch attention refuses MLA and context parallelism, which need TE."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule


class TorchAttention(MegatronModule):
    """Causal attention by torch: value heads of another size than the queries', keys gathered over context ranks."""

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[s, b, heads, size] each -> [s, b, heads * value size]."""
        ranks = self.config.context_parallel_size
        places = [_places(query.shape[0], ranks, rank) for rank in range(ranks)]
        if ranks > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (_Gather.apply(t, group).flatten(0, 1) for t in (key, value))
        mine = places[parallel_state.get_context_parallel_rank()]
        seen = torch.cat(places) <= mine[:, None]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(-2)


def _places(length: int, ranks: int, rank: int) -> torch.Tensor:
    """Positions of a context rank's tokens: a piece from the front and its mirror from the back, as Megatron cuts."""
    if ranks == 1:
        return torch.arange(length)
    piece = length // 2
    front, back = rank * piece, (2 * ranks - 1 - rank) * piece
    return torch.cat([torch.arange(front, front + piece), torch.arange(back, back + piece)])


class _Gather(torch.autograd.Function):
    """[s, ...] -> [ranks, s, ...]; the gradient sums what every rank has for a rank's own part."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        torch.distributed.all_gather(parts, local.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None
