"""FLOPs of connections: the paper's terms, and those that torch counts of the readable reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_fc.connections import FracConfig, HyperConfig, ManifoldConfig, reference
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs import flops
from megatron_fc.connections.reference import Config
from support.family import name, random_site, random_streams

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


@pytest.mark.parametrize(("n", "m"), [(4, 2), (6, 3)])
def test_the_shape_between(n: int, m: int) -> None:
    """n slots of d/m are projected to 1+m+n coefficients, read m times and carried n times; o is written n times."""
    c = D // m
    expected = 2 * n * c * (1 + m + n) + 2 * n * m * c + 2 * n * n * c + 2 * n * c
    assert flops.site(HyperConfig(slots=n, fractions=m), D) == expected


@pytest.mark.parametrize(("n", "m"), [(4, 1), (4, 4)])
def test_on_a_manifold_the_whole_stream_predicts(n: int, m: int) -> None:
    stream = n * D // m
    config = ManifoldConfig(slots=n, fractions=m)
    assert flops.projection(config, D) == 2 * stream * (n * m + n + n * n)
    assert flops.site(config, D) - flops.projection(config, D) == 2 * stream * (m + n + 1)


def test_a_learned_leave_predicts_and_sums() -> None:
    assert flops.leave(ManifoldConfig(slots=4, leave="learned"), D) == 2 * 4 * 4 * D + 2 * 4 * D
    assert flops.leave(ManifoldConfig(slots=4), D) == flops.leave(FracConfig(rate=4), D) == 0


@pytest.mark.parametrize(
    ("config", "giga"), [(FracConfig(rate=4), 0.00236), (FracConfig(rate=2), 0.00131), (HyperConfig(slots=4), 0.00629)]
)
def test_of_the_papers_models(config: ConnectionConfig, giga: float) -> None:
    """GFLOPs per token and forward pass, d = 2048, 16 layers; the papers print 0.0013 for DFCx4, 0.0049 for DHCx4."""
    assert round(32 * flops.site(config, 2048) / 1e9, 5) == giga


@pytest.mark.parametrize(
    "config",
    [
        FracConfig(rate=2),
        FracConfig(rate=4, dynamic=False),
        FracConfig(rate=4, dynamic_beta=False),
        HyperConfig(slots=3),
        HyperConfig(slots=4, fractions=2),
        ManifoldConfig(slots=3),
        ManifoldConfig(slots=3, fractions=3),
    ],
    ids=name,
)
def test_products_as_torch_counts_them(config: Config) -> None:
    """All but beta times o, which is no product of matrices. On a manifold the reference projects for each table."""
    site, (h, o) = random_site(config, D), random_streams(config, D, TOKENS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        p = site.site_parameters()
        reference.width(h, p, config)
        reference.depth(o, h, p, config)
    expected = flops.site(config, D) - 2 * config.stream_width(D)
    again = 2 * flops.projection(config, D) if isinstance(config, ManifoldConfig) else 0
    assert counter.get_total_flops() == TOKENS * (expected + again)
