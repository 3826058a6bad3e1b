"""Hyper-Connections against loops over streams, and against the Frac-Connection that they are at n = 1."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fc import FracConfig, FracConnection
from megatron_fc.connections.hyper import HyperConnection
from megatron_fc.errors import UserError

OPTIONS: list[dict[str, Any]] = [
    {"dynamic": False},
    {},
    {"norm": "layernorm"},
    {"norm": "none", "tanh": False, "scale": False},
]
TOKENS, WIDTH = 5, 6


def random_site(streams: int, **options: Any) -> HyperConnection:
    torch.manual_seed(streams)
    site = HyperConnection(WIDTH, streams, sub_layer=1, config=FracConfig(rate=1, **options)).double()
    with torch.no_grad():
        for parameter in site.parameters():
            parameter += torch.randn_like(parameter)
    return site


def by_loops(site: HyperConnection, streams: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """x and the next streams of one token, [d] and [n, d], written out from the paper's equations."""
    config, n = site.config, len(streams)
    beta, alpha = site.static_beta.clone(), site.static_alpha.clone()
    if config.dynamic:
        for i, h in enumerate(streams):
            if config.norm == "layernorm":
                h = h - h.mean()
            if config.norm != "none":
                h = h / (h.square().mean() + config.norm_eps).sqrt() * site.norm_weight
            z = torch.stack([(h * row).sum() for row in site.dynamic_weight])
            z = z.tanh() if config.tanh else z
            beta[i] += z[0] * (site.scale_beta[0] if config.scale else 1)
            alpha[i] += z[1:] * (site.scale_alpha[0] if config.scale else 1)
    x = sum(alpha[i, 0] * streams[i] for i in range(n))
    following = [beta[j] * o + sum(alpha[i, 1 + j] * streams[i] for i in range(n)) for j in range(n)]
    return x, torch.stack(following)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_as_loops(n: int, options: dict[str, Any]) -> None:
    site = random_site(n, **options)
    streams, o = torch.randn(TOKENS, n, WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    with torch.no_grad():
        x, beta, mixed = site(streams)
        found = x, site.depth(o, beta, mixed)
        tokens = [by_loops(site, *token) for token in zip(streams, o, strict=True)]
    for one, expected in zip(found, zip(*tokens, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(expected))


@pytest.mark.parametrize("options", OPTIONS)
def test_one_stream_is_the_frac_connection_of_rate_1(options: dict[str, Any]) -> None:
    hyper, frac = random_site(1, **options), FracConnection(WIDTH, FracConfig(rate=1, **options)).double()
    p = dict(hyper.named_parameters())
    gamma, alpha = p.pop("static_alpha").flatten().split(1)
    frac.load_state_dict({**p, "static_gamma": gamma, "static_alpha": alpha})
    h, o = torch.randn(TOKENS, WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    x, beta, mixed = hyper(h.unsqueeze(-2))
    torch.testing.assert_close(x, frac(h))
    torch.testing.assert_close(hyper.depth(o, beta, mixed).squeeze(-2), frac.depth(o, h))


def test_starts_as_the_residual_network() -> None:
    """Every stream is h, which goes to the sub-layer, and o is added to every one."""
    h, o = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    streams = h.unsqueeze(-2).expand(TOKENS, 4, WIDTH)
    for sub_layer in range(5):
        site = HyperConnection(WIDTH, 4, sub_layer, FracConfig(rate=1))
        assert site.static_alpha[:, 0].argmax() == sub_layer % 4
        x, beta, mixed = site(streams)
        assert torch.equal(x, h)
        assert torch.equal(site.depth(o, beta, mixed), streams + o.unsqueeze(-2))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="streams=0 must be at least 1"):
        HyperConnection(WIDTH, 0, 0, FracConfig(rate=1))
    with pytest.raises(UserError, match="rate=2 would split"):
        HyperConnection(WIDTH, 2, 0, FracConfig(rate=2))
