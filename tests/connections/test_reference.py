"""Sites and the readable reference against an independent float64 implementation, forward and gradients; gradcheck."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_fc import FracConfig, FracConnection, HyperConfig, ManifoldConfig
from megatron_fc.connections import reference
from megatron_fc.connections.reference import Config
from support import oracle
from support.family import HYPER, MANIFOLD, MEMBERS, name, random_site, random_streams

RATES = (1, 2, 4, 8)
every_member = pytest.mark.parametrize("config", MEMBERS, ids=name)
WIDTH = 24


def by_oracle(site: Any, h: torch.Tensor, o: torch.Tensor, plant: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """x and the next stream; with one of `FAULTS` planted."""
    p, config = {key: value.detach().numpy() for key, value in site.named_parameters()}, site.config
    n, m = config.slots, config.fractions
    turns = oracle.cycles(config)
    if plant == "blocks instead of cycles":
        turns = [j // (n // m) for j in range(n)]
    elif plant == "a cyclic write off by one":
        turns = [(j + 1) % m for j in range(n)]
    xs, streams = [], []
    for token, out in zip(h.detach().reshape(-1, h.shape[-1]), o.detach().reshape(-1, o.shape[-1]), strict=True):
        beta, gamma, alpha = oracle.coefficients(token.numpy(), p, config)
        if plant == "a transposed alpha":
            alpha = alpha.T
        elif plant == "a wrong read column":
            gamma = np.roll(gamma, 1, axis=1)
        elif plant == "a wrong read row":
            gamma = np.roll(gamma, 1, axis=0)
        elif plant == "a wrong written slot":
            beta = np.roll(beta, 1)
        xs.append(oracle.read(token.numpy(), gamma))
        streams.append(oracle.write(out.numpy(), token.numpy(), beta, alpha, turns))
    return np.stack(xs).reshape(o.shape), np.stack(streams).reshape(h.shape)


def assert_equal(site: Any, h: torch.Tensor, o: torch.Tensor, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """The site's results and the reference's are these, to the rounding of float64 sums of terms of order one."""
    p = site.site_parameters()
    x, handover = site(h, hand_over=True)
    results = (
        (x, site.depth(o, h, handover)),
        (site(h), site.depth(o, h)),
        (reference.width(h, p, site.config), reference.depth(o, h, p, site.config)),
    )
    for pair in results:
        for found, wanted in zip(pair, expected, strict=True):
            np.testing.assert_allclose(found.detach(), wanted, rtol=1e-11, atol=1e-11)


@every_member
def test_forward_equals_the_oracle(config: Config) -> None:
    site, (h, o) = random_site(config, WIDTH), random_streams(config, WIDTH, 3, 2)
    assert_equal(site, h, o, by_oracle(site, h, o))


BETWEEN = HyperConfig(slots=6, fractions=3)
FAULTS = [
    *(
        (config, fault)
        for config in (FracConfig(rate=4), FracConfig(rate=4, dynamic=False), ManifoldConfig(slots=4, fractions=4))
        for fault in ("a transposed alpha", "a wrong read column", "a cyclic write off by one", "a wrong written slot")
    ),
    *(
        (config, fault)
        for config in (HyperConfig(slots=4), HyperConfig(slots=4, dynamic=False), ManifoldConfig(slots=4))
        for fault in ("a transposed alpha", "a wrong read row", "a wrong written slot")
    ),
    (BETWEEN, "a transposed alpha"),
    (BETWEEN, "a wrong read column"),
    (BETWEEN, "a wrong read row"),
    (BETWEEN, "a cyclic write off by one"),
    (BETWEEN, "blocks instead of cycles"),
]


@pytest.mark.parametrize(
    ("config", "fault"), FAULTS, ids=lambda value: value if isinstance(value, str) else name(value)
)
def test_a_planted_fault_is_noticed(config: Config, fault: str) -> None:
    site, (h, o) = random_site(config, WIDTH), random_streams(config, WIDTH, 3)
    right, wrong = by_oracle(site, h, o), by_oracle(site, h, o, fault)
    place = int("read" not in fault)
    assert np.abs(right[place] - wrong[place]).max() > 0.1
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(site, h, o, wrong)


@every_member
def test_gradients_equal_finite_differences_of_the_oracle(config: Config) -> None:
    step = 1e-6
    site, (h, o) = random_site(config, WIDTH), random_streams(config, WIDTH, 2)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in (o, h)]

    def objective() -> float:
        x, after = by_oracle(site, h, o)
        return float((x * weights[0].numpy()).sum() + (after * weights[1].numpy()).sum())

    x, handover = site(h, hand_over=True)
    ((x * weights[0]).sum() + (site.depth(o, h, handover) * weights[1]).sum()).backward()
    for key, tensor in [("h", h), ("o", o), *site.named_parameters()]:
        assert tensor.grad is not None, key
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
        with torch.no_grad():
            tensor += step * direction
            above = objective()
            tensor -= 2 * step * direction
            below = objective()
            tensor += step * direction
        # Central differences: O(step^2) truncation and 1e-16/step rounding, both below 1e-8 of values of order ten.
        measured = (above - below) / (2 * step)
        np.testing.assert_allclose(float((tensor.grad * direction).sum()), measured, rtol=1e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("config", [FracConfig(rate=2), FracConfig(rate=2, dynamic=False), *HYPER, *MANIFOLD], ids=name)
def test_gradcheck(config: Config) -> None:
    width = 2 * config.fractions
    site, (h, o) = random_site(config, width), random_streams(config, width, 2)

    def both(h: torch.Tensor, o: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, handover = site(h, hand_over=True)
        return x, site.depth(o, h, handover)

    # Of random projections: a full check of every element takes ten times as long.
    assert torch.autograd.gradcheck(both, (h, o, *site.parameters()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [*(FracConfig(rate=rate) for rate in RATES), HyperConfig(slots=4), BETWEEN, ManifoldConfig(slots=4)],
    ids=name,
)
def test_half_precision_rounds_once(dtype: torch.dtype, config: Config) -> None:
    """fp32 coefficients and mixing: the result is the float64 one rounded to the stream's dtype, within one ulp."""
    site, (h, o) = random_site(config, WIDTH), random_streams(config, WIDTH, 50)
    h, o = h.detach().to(dtype), o.detach().to(dtype)
    x, after = by_oracle(site, h.double(), o.double())
    single = site.float()
    ulp = torch.finfo(dtype).eps
    for result, expected in ((single(h), x), (single.depth(o, h), after)):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.double().detach(), expected, rtol=ulp, atol=ulp * 1e-2)


@pytest.mark.parametrize("config", [FracConfig(rate=4), BETWEEN, ManifoldConfig(slots=4)], ids=name)
def test_autocast_does_not_lower_the_coefficients(config: Config) -> None:
    single = random_site(config, WIDTH).float()
    h, o = (t.detach().float() for t in random_streams(config, WIDTH, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = single(h), single.depth(o, h)
    torch.testing.assert_close(inside, (single(h), single.depth(o, h)), rtol=0, atol=0)


@pytest.mark.parametrize("config", [FracConfig(rate=2), BETWEEN, ManifoldConfig(slots=2)], ids=name)
@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (2, 3, 4)])
def test_any_leading_shape(shape: tuple[int, ...], config: Config) -> None:
    site = random_site(config, 12)
    h, o = (t.detach() for t in random_streams(config, 12, *shape))
    flat = site.depth(o.reshape(-1, o.shape[-1]), h.reshape(-1, h.shape[-1])).reshape(h.shape)
    assert site(h).shape == o.shape
    torch.testing.assert_close(site.depth(o, h), flat)


@pytest.mark.parametrize("config", [FracConfig(rate=4), BETWEEN, ManifoldConfig(slots=2)], ids=name)
def test_strided_stream(config: Config) -> None:
    site = random_site(config, 12)
    h = torch.randn(6, 3, config.stream_width(12), dtype=torch.float64)
    torch.testing.assert_close(site(h.transpose(0, 1)), site(h).transpose(0, 1))


def test_a_frac_connection_is_exact_in_any_layout_of_tokens() -> None:
    site = random_site(FracConfig(rate=4), 16)
    assert isinstance(site, FracConnection)
    h = torch.randn(6, 3, 16, dtype=torch.float64)
    assert torch.equal(site(h.transpose(0, 1)), site(h).transpose(0, 1))
