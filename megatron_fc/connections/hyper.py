"""HyperConnection: a site of Hyper-Connections, and of the shapes between them and Frac-Connections."""

import torch

from megatron_fc.connections.config import HyperConfig
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters, set_initial_values
from megatron_fc.connections.site import Site


class HyperConnection(Site):
    """One Hyper-Connection site (arXiv 2409.19606), `megatron_fc.connections.base.Connection`.

    At its initial values the network is the residual one: with one fraction the input is stream `sub_layer % n`, with
    more the first of the slots that stand for each. Hyper-Connections also scale the initial output projections of
    attention and MLP by sqrt(n), which is not the site's to do.

    Args:
        hidden_size: width d of a sub-layer's input and output.
        config: the options.
        sub_layer: number of the sub-layer in the network, from 0.

    Raises:
        UserError: the number of fractions does not divide the hidden size.
    """

    config: HyperConfig

    def __init__(self, hidden_size: int, config: HyperConfig, sub_layer: int = 0) -> None:
        super().__init__(hidden_size, config, sub_layer)

    def reset_parameters(self) -> None:
        """Set the initial values: beta = 1, gamma one slot for each fraction, alpha = I, W = 0, s = initial_scale."""
        with torch.no_grad():
            set_initial_values(self.site_parameters(), self.config, self.sub_layer)

    def site_parameters(self) -> PerSlotParameters:
        """Return the parameters by name, None for those that the configuration does not have."""
        return PerSlotParameters(**{name: getattr(self, name) for name in PerSlotParameters._fields})

    def operands(self) -> Operands:
        """Return the site as the operations take it."""
        return Operands.of(self.site_parameters(), self.config)
