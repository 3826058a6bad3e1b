"""FLOPs of connections: the paper's terms, and those that torch counts of the readable references."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_fc.connections import FracConfig, HyperConfig, reference
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs import flops

D, TOKENS = 48, 5


@pytest.mark.parametrize("rate", [1, 2, 4, 8])
def test_frac_connections(rate: int) -> None:
    dynamic, static = FracConfig(rate=rate), FracConfig(rate=rate, dynamic=False)
    assert flops.site(dynamic, D) == 2 * D * (2 * rate + 1) + 4 * rate * D + 2 * D
    assert flops.site(static, D) == 4 * rate * D + 2 * D
    assert flops.width(static, D) == 2 * rate * D


@pytest.mark.parametrize("n", [1, 2, 4])
def test_hyper_connections(n: int) -> None:
    """Every stream is projected to n + 2 coefficients, read once and carried n times; o is written n times."""
    assert flops.site(HyperConfig(slots=n), D) == 2 * n * D * (n + 2) + 2 * n * D + 2 * n * n * D + 2 * n * D
    assert flops.depth(HyperConfig(slots=n, dynamic=False), D) == 2 * n * n * D + 2 * n * D


@pytest.mark.parametrize("dynamic", [True, False])
def test_one_slot_is_one_slot(dynamic: bool) -> None:
    hyper, frac = HyperConfig(slots=1, dynamic=dynamic), FracConfig(rate=1, dynamic=dynamic)
    assert (flops.width(hyper, D), flops.depth(hyper, D)) == (flops.width(frac, D), flops.depth(frac, D))


@pytest.mark.parametrize(
    "config", [FracConfig(rate=2), FracConfig(rate=4, dynamic=False), HyperConfig(slots=3)], ids=str
)
def test_products_as_torch_counts_them(config: ConnectionConfig) -> None:
    """All but beta times o, which is no product of matrices."""
    site = config.build(D)
    h, o = torch.randn(TOKENS, config.stream_width(D)), torch.randn(TOKENS, D)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(config, FracConfig):
            p = site.site_parameters()
            reference.width(h, p, config)
            reference.depth(o, h, p, config)
        else:
            x, handover = site(h, hand_over=True)
            site.depth(x, h, handover)
    written = 2 * config.stream_width(D)
    assert counter.get_total_flops() == TOKENS * (flops.site(config, D) - written)
