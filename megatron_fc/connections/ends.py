"""The ends of a stack of connections: how the stream is entered from an embedding, and how it is left again."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import ManifoldConfig
from megatron_fc.connections.fp32 import Fp32Parameters
from megatron_fc.connections.initial import xavier_uniform_
from megatron_fc.connections.on_manifold import LEAVE_NAMES, residual_bias


def enter(h: Tensor, config: ConnectionConfig) -> Tensor:
    """Slot j is fraction (j-1) mod m + 1 of h: [..., d] -> [..., n*c], n/m copies side by side; h itself for n = m.

    The gradients of the copies are added up here, to one: where a stream is entered twice, as with recomputed norms,
    the order in which autograd adds the two is the same to the bit.
    """
    copies = config.slots // config.fractions
    return h if copies == 1 else h.unsqueeze(-2).expand(*h.shape[:-1], copies, h.shape[-1]).flatten(-2)


def mean(h: Tensor, config: ConnectionConfig) -> Tensor:
    """Every fraction is the mean of the slots that stand for it: [..., n*c] -> [..., d]; h itself for n = m.

    The papers of Hyper-Connections sum, which the last norm undoes, up to its epsilon.
    """
    copies = config.slots // config.fractions
    return h if copies == 1 else h.unflatten(-1, (copies, -1)).mean(-2)


class MeanLeave(nn.Module):
    """The end of a network without parameters: [..., n*c] -> [..., d]."""

    def __init__(self, config: ConnectionConfig) -> None:
        super().__init__()
        self.config = config

    def place(self, seed: int) -> None:
        """Nothing to draw."""

    def start_as_residual(self) -> None:
        """Nothing to set."""

    def forward(self, h: Tensor) -> Tensor:
        return mean(h, self.config)


class LearnedLeave(Fp32Parameters):
    """The end of an mHC network with ``leave="learned"``: a sum of the streams, [..., n*d] -> [..., d].

    Its weights are predicted as gamma of mHC is, sigmoid(scale W u + bias) + eps.

    Args:
        hidden_size: width d.
        config: of the network's sites.
    """

    leave_weight: Tensor
    leave_bias: Tensor
    leave_scale: Tensor

    def __init__(self, hidden_size: int, config: ManifoldConfig) -> None:
        super().__init__()
        self.config = config
        self.seed: int | None = None
        self.register_parameters(LEAVE_NAMES, config.leave_shapes(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values, those of a site: W by Xavier, bias 0, scale 0.01."""
        with torch.no_grad():
            xavier_uniform_(self.leave_weight, self.seed)
            self.leave_bias.fill_(0)
            self.leave_scale.fill_(0.01)

    def place(self, seed: int) -> None:
        """Set the initial values, drawn from a stream of their own for the network's seed."""
        self.seed = hash((seed, -2)) % 2**63
        self.reset_parameters()

    def start_as_residual(self) -> None:
        """Set the values at which equal streams leave as one of them, up to eps: the scale 0, every weight 1/n."""
        self.reset_parameters()
        with torch.no_grad():
            self.leave_bias.fill_(residual_bias(self.config.slots))
            self.leave_scale.fill_(0)

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            stream = h.to(torch.promote_types(h.dtype, torch.float32))
            u = F.rms_norm(stream, stream.shape[-1:], None, self.config.norm_eps)
            z = self.leave_scale * F.linear(u, self.leave_weight) + self.leave_bias
            weights = torch.sigmoid(z) + self.config.sinkhorn_eps
            streams = stream.unflatten(-1, (self.config.slots, -1))
            return (weights.unsqueeze(-1) * streams).sum(-2).to(h.dtype)
