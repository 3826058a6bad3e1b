"""Hyper-Connections (arXiv 2409.19606) in plain PyTorch, to count the bytes that Frac-Connections are compared with.

n streams H_1..H_n of width d in place of one stream's m fractions: the other half of the family of arXiv 2503.14125,
figure 1. At n = 1 it is the Frac-Connection of rate 1. A reference to read and to count, in the operations of the
paper's own listing; nothing here trains models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc.connections.config import FracConfig
from megatron_fc.errors import UserError


class HyperConnection(nn.Module):
    """One site: n streams -> the sub-layer's input, and the sub-layer's output -> the next n streams.

    ::

        streams = h.unsqueeze(-2).expand(*h.shape[:-1], n, d)  # at the start of the stack: copies of the embedding
        x, beta, mixed = site(streams)                         # x = sum_i a_i H_i, mixed_j = sum_i r_ij H_i
        streams = site.depth(o, beta, mixed)                   # H'_j = b_j o + mixed_j
        h = streams.sum(-2)                                    # at its end, before the final norm

    The dynamic part of the weights in row i comes from stream i alone, as in a Frac-Connection: norm over d, a shared
    projection, tanh, scale. Everything is computed in the dtype of the streams.

    Args:
        hidden_size: width d of a stream.
        streams: expansion rate n.
        sub_layer: number of the sub-layer, from 0: its input starts as stream `sub_layer % n`.
        config: dynamic, norm, tanh, scale, initial_scale and norm_eps are taken from it; its rate must be 1.

    Raises:
        UserError: fewer than one stream, or a rate other than 1.
    """

    def __init__(self, hidden_size: int, streams: int, sub_layer: int, config: FracConfig) -> None:
        super().__init__()
        if streams < 1:
            raise UserError(f"streams={streams!r} must be at least 1: use 2 or 4")
        if config.rate != 1:
            raise UserError(f"rate={config.rate} would split streams that Hyper-Connections keep whole: set rate to 1")
        self.config = config
        self.static_beta = nn.Parameter(torch.ones(streams))
        # Columns: the sub-layer's input, then the streams.
        self.static_alpha = nn.Parameter(
            torch.cat((torch.eye(streams)[:, [sub_layer % streams]], torch.eye(streams)), 1)
        )
        if config.dynamic:
            self.dynamic_weight = nn.Parameter(torch.zeros(streams + 2, hidden_size))  # rows: beta, then as the columns
        if config.dynamic and config.scale:
            self.scale_beta = nn.Parameter(torch.full((1,), config.initial_scale))
            self.scale_alpha = nn.Parameter(torch.full((1,), config.initial_scale))
        if config.dynamic and config.norm != "none":
            self.norm_weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Width connection.

        Args:
            streams: [..., n, d].

        Returns:
            The sub-layer's input [..., d], before the sub-layer's own norm; beta [..., n] and the mixed streams
            [..., n, d], for `depth`.
        """
        lead = streams.shape[:-2]
        beta, alpha = (static.expand(*lead, *static.shape) for static in (self.static_beta, self.static_alpha))
        if self.config.dynamic:
            z = F.linear(self._normalise(streams), self.dynamic_weight)
            z = torch.tanh(z) if self.config.tanh else z
            of_beta, of_alpha = z[..., 0], z[..., 1:]
            if self.config.scale:
                of_beta, of_alpha = self.scale_beta * of_beta, self.scale_alpha * of_alpha
            beta, alpha = beta + of_beta, alpha + of_alpha
        x, mixed = (alpha.mT @ streams).split((1, streams.shape[-2]), dim=-2)
        return x.squeeze(-2), beta, mixed

    def depth(self, o: Tensor, beta: Tensor, mixed: Tensor) -> Tensor:
        """Depth connection: sub-layer output [..., d], and what `forward` returned -> the next streams [..., n, d]."""
        return beta.unsqueeze(-1) * o.unsqueeze(-2) + mixed

    def _normalise(self, streams: Tensor) -> Tensor:
        shape, eps = streams.shape[-1:], self.config.norm_eps
        if self.config.norm == "rmsnorm":
            return F.rms_norm(streams, shape, self.norm_weight, eps)
        if self.config.norm == "layernorm":
            return F.layer_norm(streams, shape, self.norm_weight, None, eps)
        return streams
