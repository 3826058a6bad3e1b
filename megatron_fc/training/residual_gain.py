"""The largest gain of a run's residual path as a TensorBoard scalar, `log_residual_gain` in the section logging.

It is that of the coefficients' part without data, which is what grows first; `megatron-fc analyze coefficients` has it
with data. Of a pipeline the last stage's sites count alone: it is the one that logs, and no ranks meet between steps.
"""

from argparse import Namespace
from typing import Any

import torch

from megatron_fc.callbacks import Callback
from megatron_fc.connections.eager import coefficients
from megatron_fc.connections.gain import gains
from megatron_fc.connections.site import Site
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.runs.summary import RESIDUAL_GAIN


class ResidualGain(Callback):
    """Writes the scalar wherever Megatron writes its own."""

    def __init__(self) -> None:
        self._sites: list[Site] = []
        self._interval = 1

    def arguments_valid(self, args: Namespace) -> None:
        """Check that every rank holds whole parameters.

        Raises:
            UserError: FSDP has them in pieces.
        """
        for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
            if getattr(args, name, False):
                raise UserError(f"log_residual_gain needs whole parameters, which {name}=true divides: drop one")
        self._interval = args.tensorboard_log_interval

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        self._sites = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Site)]
        return chunks

    def after_step(self, iteration: int) -> None:
        from megatron.training.global_vars import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer is not None and self._sites and (iteration + 1) % self._interval == 0:
            writer.add_scalar(RESIDUAL_GAIN, largest_gain(self._sites), iteration + 1)


def largest_gain(sites: list[Site]) -> float:
    """Return the largest gain of sites in a row, of their coefficients without data."""
    with torch.no_grad():
        alphas = [
            coefficients(next(site.parameters()).new_zeros(1, site.stream_width), site.operands()).alpha
            for site in sites
        ]
        return gains(torch.stack(alphas).cpu()).largest
