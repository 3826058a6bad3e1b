"""The largest gain of a row of sites, without data."""

from argparse import Namespace

import pytest
import torch

from megatron_fc import HyperConfig
from megatron_fc.errors import UserError
from megatron_fc.training.residual_gain import ResidualGain, largest_gain


def test_the_largest_gain_is_that_of_the_product_of_all_layers_between() -> None:
    sites = [HyperConfig(slots=2).build(hidden_size=8) for _ in range(3)]
    with torch.no_grad():
        for site, factor in zip(sites, (0.5, 1.5, 2.0), strict=True):
            site.static_alpha.copy_(factor * torch.eye(2).flatten())
    assert largest_gain(sites) == pytest.approx(1.5 * 2.0)


def test_parameters_in_pieces_are_refused() -> None:
    with pytest.raises(UserError, match="which use_megatron_fsdp=true divides: drop one"):
        ResidualGain().arguments_valid(Namespace(use_megatron_fsdp=True))
