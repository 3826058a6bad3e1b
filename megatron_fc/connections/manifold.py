"""ManifoldConnection: a site whose coefficients lie on a manifold (mHC and mFC)."""

import torch
from torch import nn

from megatron_fc.connections.config import ManifoldConfig
from megatron_fc.connections.initial import xavier_uniform_
from megatron_fc.connections.on_manifold import ManifoldParameters, residual_bias
from megatron_fc.connections.operands import ManifoldOperands
from megatron_fc.connections.site import Site

INITIAL_SCALE = 0.01
# sigmoid(4) = 0.98: the slots of mFC hold different content, so x starts close to the stream and is not it.
FRACTION_BIAS = 4.0


class ManifoldConnection(Site):
    """One site of mHC (arXiv 2512.24880) or mFC, `megatron_fc.connections.base.Connection`.

    `mapping_weight` starts at random, which tells the streams of mHC apart, that start as copies; all other values of
    mHC are the paper's. The slots of mFC are fractions of one stream: its bias starts at +4 on the diagonals of gamma
    and alpha and at -4 beside them. So it is never the residual network to the bit.

    Args:
        hidden_size: width d of a sub-layer's input and output.
        config: the options.

    Raises:
        UserError: the number of fractions does not divide the hidden size.
    """

    makes_boundaries = False  # torch predicts the coefficients from the whole stream, which has to be there
    config: ManifoldConfig
    mapping_weight: nn.Parameter
    mapping_bias: nn.Parameter
    mapping_scale: nn.Parameter

    def __init__(self, hidden_size: int, config: ManifoldConfig) -> None:
        super().__init__(hidden_size, config)

    def reset_parameters(self) -> None:
        """Set the initial values: W by Xavier, scales 0.01, bias 0; of mFC +4 and -4 for gamma and alpha."""
        n, m = self.config.slots, self.config.fractions
        with torch.no_grad():
            xavier_uniform_(self.mapping_weight, self.seed)
            self.mapping_scale.fill_(INITIAL_SCALE)
            self.mapping_bias.fill_(0)
            if n == m > 1:
                for table in (self.mapping_bias[: n * n], self.mapping_bias[-n * n :]):
                    table.fill_(-FRACTION_BIAS).view(n, n).diagonal().fill_(FRACTION_BIAS)

    def start_as_residual(self) -> None:
        """Set the values at which mHC is the residual network, up to its epsilons: for upcycling.

        The scales are 0, so that nothing depends on W, which stays random: from the second step on the streams differ.
        """
        self.config.refuse_residual_start()
        n = self.config.slots
        self.reset_parameters()
        with torch.no_grad():
            self.mapping_scale.fill_(0)
            self.mapping_bias[:n].fill_(residual_bias(n))

    def site_parameters(self) -> ManifoldParameters:
        """Return the parameters by name."""
        return ManifoldParameters(self.mapping_weight, self.mapping_bias, self.mapping_scale)

    def operands(self) -> ManifoldOperands:
        """Return the site as the operations take it."""
        return ManifoldOperands.of(self.site_parameters(), self.config)
