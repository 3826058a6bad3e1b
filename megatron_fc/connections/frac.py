"""FracConnection: a site of Frac-Connections."""

import torch

from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters, set_initial_values
from megatron_fc.connections.site import Site


class FracConnection(Site):
    """One Frac-Connection site: the width connection before a sub-layer, the depth connection after it.

    A `megatron_fc.connections.base.Connection`::

        x = fc(h)            # the sub-layer's input; fc.width(h) is the same
        h = fc.depth(o, h)   # the next residual stream, o being the sub-layer's output

    The parameters are those of arXiv 2503.14125 section 3; at their initial values the site is a plain residual
    connection to the bit. Statics, scales and the norm's weight are one-dimensional and `dynamic_weight` is
    two-dimensional, which gives them the paper's weight decay under Megatron's rule.

    Args:
        hidden_size: width d of the residual stream.
        config: the options.

    Raises:
        UserError: the rate does not divide the hidden size.
    """

    config: FracConfig

    def __init__(self, hidden_size: int, config: FracConfig) -> None:
        super().__init__(hidden_size, config)

    def reset_parameters(self) -> None:
        """Set the initial values: B = 1, Y = A = I, W = 0, s = initial_scale (eq. 15)."""
        with torch.no_grad():
            set_initial_values(self.site_parameters(), self.config)

    def site_parameters(self) -> PerSlotParameters:
        """Return the parameters by name, None for those that the configuration does not have."""
        return PerSlotParameters(**{name: getattr(self, name) for name in PerSlotParameters._fields})

    def operands(self) -> Operands:
        """Return the site as the operations take it."""
        return Operands.of(self.site_parameters(), self.config)
