"""Hyper-Connections (arXiv 2409.19606) in plain PyTorch under autograd: a reference to read, count and check with.

n streams H_1..H_n of width d in place of one stream's m fractions: the other half of the family of arXiv 2503.14125,
figure 1. At n = 1 it is the Frac-Connection of rate 1. The operations are those of the paper's own listing, in the
dtype of the streams; the bytes that they move are counted in `megatron_fc.connections.costs.eager_traffic`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc.connections.config import HyperConfig


class HyperHandover(NamedTuple):
    """What a width connection leaves for the depth connection of the same site.

    Attributes:
        beta: [..., n].
        mixed: [..., n, d], the mixed streams.
    """

    beta: Tensor
    mixed: Tensor


class HyperConnection(nn.Module):
    """One Hyper-Connection site, `megatron_fc.connections.base.Connection`, on n streams side by side, [..., n*d].

    ::

        H = site.enter(h)     # n copies of the embedding
        x = site(H)           # x = sum_i gamma_i H_i
        H = site.depth(o, H)  # H'_j = beta_j o + sum_i alpha_ij H_i
        h = site.leave(H)     # the mean of the streams

    The dynamic part of the weights in row i comes from stream i alone, as in a Frac-Connection: norm over d, a shared
    projection, tanh, scale.

    Args:
        hidden_size: width d of a stream.
        config: the options.
        sub_layer: number of the sub-layer, from 0: its input starts as stream `sub_layer % n`.

    Raises:
        UserError: the hidden size is not positive.
    """

    static_beta: Tensor
    static_gamma: Tensor
    static_alpha: Tensor
    dynamic_weight: Tensor
    scale_beta: Tensor
    scale_alpha: Tensor
    norm_weight: Tensor

    def __init__(self, hidden_size: int, config: HyperConfig, sub_layer: int = 0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        identity = torch.eye(config.slots)
        initial = {
            "static_beta": 1.0,
            "static_gamma": identity[sub_layer % config.slots],
            "static_alpha": identity.flatten(),
            "dynamic_weight": 0.0,
            "scale_beta": config.initial_scale,
            "scale_alpha": config.initial_scale,
            "norm_weight": 1.0,
        }
        for name, shape in config.parameter_shapes(hidden_size).items():
            values = torch.as_tensor(initial[name]).expand(shape).clone()
            self.register_parameter(name, nn.Parameter(values))

    def enter(self, h: Tensor) -> Tensor:
        """n copies of the embedding: [..., d] -> [..., n*d]."""
        return torch.cat([h] * self.config.slots, dim=-1)

    def leave(self, h: Tensor) -> Tensor:
        """The mean of the streams: [..., n*d] -> [..., d].

        The paper sums them, which the last norm undoes, up to its epsilon.
        """
        return self._streams(h).mean(-2)

    def forward(self, h: Tensor, norm: Callable[[Tensor], Tensor] | None = None, hand_over: bool = False) -> Any:
        """Width connection.

        Args:
            h: the streams [..., n*d].
            norm: the sub-layer's norm, applied to the result.
            hand_over: also return what `depth` can take over.

        Returns:
            The sub-layer's input x [..., d]; with `hand_over` (x, handover).
        """
        n, streams = self.config.slots, self._streams(h)
        lead = streams.shape[:-2]
        # Columns: the sub-layer's input, then the streams.
        weights = torch.cat((self.static_gamma[:, None], self.static_alpha.view(n, n)), 1).expand(*lead, n, 1 + n)
        beta = self.static_beta.expand(*lead, n)
        if self.config.dynamic:
            z = F.linear(self._normalise(streams), self.dynamic_weight)
            z = torch.tanh(z) if self.config.tanh else z
            of_beta, of_weights = z[..., 0], z[..., 1:]
            if self.config.scale:
                of_beta, of_weights = self.scale_beta * of_beta, self.scale_alpha * of_weights
            beta, weights = beta + of_beta, weights + of_weights
        x, mixed = (weights.mT @ streams).split((1, n), dim=-2)
        x = x.squeeze(-2) if norm is None else norm(x.squeeze(-2))
        return (x, HyperHandover(beta, mixed)) if hand_over else x

    def depth(self, o: Tensor, h: Tensor, handover: HyperHandover | None = None) -> Tensor:
        """Depth connection.

        Args:
            o: the sub-layer's output [..., d].
            h: the streams [..., n*d] that went into the width connection.
            handover: what the width connection handed over for h; without it everything is computed again.

        Returns:
            The next streams [..., n*d].
        """
        if handover is None:
            _, handover = self(h, hand_over=True)
        beta, mixed = handover
        return (beta.unsqueeze(-1) * o.unsqueeze(-2) + mixed).flatten(-2)

    def _streams(self, h: Tensor) -> Tensor:
        """[..., n*d] -> [..., n, d]."""
        return h.unflatten(-1, (self.config.slots, self.hidden_size))

    def _normalise(self, streams: Tensor) -> Tensor:
        shape, eps = streams.shape[-1:], self.config.norm_eps
        if self.config.norm == "rmsnorm":
            return F.rms_norm(streams, shape, self.norm_weight, eps)
        if self.config.norm == "layernorm":
            return F.layer_norm(streams, shape, self.norm_weight, None, eps)
        return streams
