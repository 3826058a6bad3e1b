"""Hyper-Connections as the paper's own listing has them (arXiv 2409.19606), in plain PyTorch under autograd: to count.

The bytes that they move are modelled by `megatron_fc.connections.costs.eager_traffic.hyper_unfused`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc import HyperConfig
from megatron_fc.connections.hyper import HyperConnection


class UnfusedHyper(HyperConnection):
    """A `HyperConnection` that computes in the dtype of the streams, operation by operation."""

    config: HyperConfig

    def forward(self, h: Tensor, norm: Callable[[Tensor], Tensor] | None = None, hand_over: bool = False) -> Any:
        """The width connection, and with `hand_over` beta and the mixed streams."""
        n, streams = self.config.slots, h.unflatten(-1, (self.config.slots, self.hidden_size))
        lead, p = streams.shape[:-2], self.site_parameters()
        # Columns: the sub-layer's input, then the streams.
        weights = torch.cat((p.static_gamma[:, None], p.static_alpha.view(n, n)), 1).expand(*lead, n, 1 + n)
        beta = p.static_beta.expand(*lead, n)
        if p.dynamic_weight is not None:
            z = F.linear(self._normalise(streams), p.dynamic_weight)
            z = torch.tanh(z) if self.config.tanh else z
            of_beta, of_weights = z[..., 0], z[..., 1:]
            if p.scale_beta is not None and p.scale_alpha is not None:
                of_beta, of_weights = p.scale_beta * of_beta, p.scale_alpha * of_weights
            beta, weights = beta + of_beta, weights + of_weights
        x, mixed = (weights.mT @ streams).split((1, n), dim=-2)
        x = x.squeeze(-2) if norm is None else norm(x.squeeze(-2))
        return (x, (beta, mixed)) if hand_over else x

    def depth(self, o: Tensor, h: Tensor, handover: Any = None, bias: Any = None, dropout: float = 0.0) -> Tensor:
        """The depth connection, from what the width connection handed over."""
        beta, mixed = handover
        return (beta.unsqueeze(-1) * o.unsqueeze(-2) + mixed).flatten(-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "UnfusedHyper":
        nn.Module._apply(self, fn, recurse)  # parameters in the dtype of the streams
        return self

    def _normalise(self, streams: Tensor) -> Tensor:
        shape, eps, weight = streams.shape[-1:], self.config.norm_eps, self.site_parameters().norm_weight
        if self.config.norm == "rmsnorm":
            return F.rms_norm(streams, shape, weight, eps)
        if self.config.norm == "layernorm":
            return F.layer_norm(streams, shape, weight, None, eps)
        return streams
