"""Forward and gradients against an independent float64 implementation, and gradcheck."""

import itertools

import numpy as np
import pytest
import torch

from megatron_fc import FracConfig, FracConnection
from support import oracle

RATES = (1, 2, 4, 8)
CONFIGS = [
    *(FracConfig(rate=rate) for rate in RATES),
    *(FracConfig(rate=rate, dynamic=False) for rate in RATES),
    *(
        FracConfig(rate=4, norm=norm, tanh=tanh, scale=scale)
        for norm, tanh, scale in itertools.product(("rmsnorm", "layernorm", "none"), (True, False), (True, False))
        if (norm, tanh, scale) != ("rmsnorm", True, True)
    ),
]


def name(config: FracConfig) -> str:
    switches = [config.norm, "tanh" if config.tanh else "linear", "scale" if config.scale else "unscaled"]
    return "-".join([config.label, *(switches if config.dynamic else [])])


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)


def random_site(config: FracConfig, width: int, seed: int = 0) -> FracConnection:
    """A site with dense, non-symmetric random weights of order one: any swapped index changes the result."""
    site = FracConnection(width, config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    return site


def random_streams(width: int, *leading: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h, o = (torch.randn(*leading, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return h.requires_grad_(), o.requires_grad_()


def by_oracle(site: FracConnection, h: torch.Tensor, o: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    p = {key: value.detach().numpy() for key, value in site.named_parameters()}
    c = site.config
    options = (p, c.rate, c.norm, c.tanh, c.norm_eps)
    tokens = h.detach().numpy().reshape(-1, h.shape[-1])
    outputs = o.detach().numpy().reshape(-1, o.shape[-1])
    x = np.stack([oracle.width(token, *options) for token in tokens])
    after = np.stack([oracle.depth(out, token, *options) for out, token in zip(outputs, tokens, strict=True)])
    return x.reshape(h.shape), after.reshape(h.shape)


@every_config
def test_forward_equals_the_oracle(config: FracConfig) -> None:
    site = random_site(config, 24)
    h, o = random_streams(24, 3, 2)
    x, after = by_oracle(site, h, o)
    # Two float64 summation orders of at most 24 terms of order one.
    np.testing.assert_allclose(site(h).detach(), x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(site.depth(o, h).detach(), after, rtol=1e-12, atol=1e-12)


@every_config
def test_gradients_equal_finite_differences_of_the_oracle(config: FracConfig) -> None:
    width, step = 16, 1e-6
    site = random_site(config, width)
    h, o = random_streams(width, 2)
    weights = [
        torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(7 + k)) for k in (0, 1)
    ]

    def objective() -> float:
        x, after = by_oracle(site, h, o)
        return float((x * weights[0].numpy()).sum() + (after * weights[1].numpy()).sum())

    ((site(h) * weights[0]).sum() + (site.depth(o, h) * weights[1]).sum()).backward()
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


@every_config
def test_gradcheck(config: FracConfig) -> None:
    site = random_site(config, 8)
    h, o = random_streams(8, 2)
    parameters = tuple(site.parameters())
    assert torch.autograd.gradcheck(lambda h, o, *_: (site(h), site.depth(o, h)), (h, o, *parameters))


@pytest.mark.parametrize("transposed", ["static_gamma", "static_alpha"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_transposed_matrix_is_noticed(transposed: str, dynamic: bool) -> None:
    site = random_site(FracConfig(rate=4, dynamic=dynamic), 24)
    h, o = random_streams(24, 3)
    x, after = by_oracle(site, h, o)
    with torch.no_grad():
        matrix = getattr(site, transposed)
        matrix.copy_(matrix.view(4, 4).t().flatten().clone())
    wrong = site(h) if transposed == "static_gamma" else site.depth(o, h)
    expected = x if transposed == "static_gamma" else after
    assert np.abs(wrong.detach().numpy() - expected).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", RATES)
def test_half_precision_rounds_once(dtype: torch.dtype, rate: int) -> None:
    """fp32 coefficients and mixing: the result is the float64 one rounded to the stream's dtype, within one ulp."""
    site = random_site(FracConfig(rate=rate), 32)
    h, o = (t.detach().to(dtype) for t in random_streams(32, 50))
    x, after = by_oracle(site, h.double(), o.double())
    single = FracConnection(32, site.config)
    single.load_state_dict(site.state_dict())
    ulp = torch.finfo(dtype).eps
    for result, expected in ((single(h), x), (single.depth(o, h), after)):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.double().detach(), expected, rtol=ulp, atol=ulp * 1e-2)


def test_autocast_does_not_lower_the_coefficients() -> None:
    site = random_site(FracConfig(rate=4), 32).to(torch.float64)
    single = FracConnection(32, site.config)
    single.load_state_dict(site.state_dict())
    h, o = (t.detach().float() for t in random_streams(32, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = single(h), single.depth(o, h)
    torch.testing.assert_close(inside, (single(h), single.depth(o, h)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (2, 3, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    site = random_site(FracConfig(rate=2), 8)
    h, o = (t.detach() for t in random_streams(8, *shape))
    flat = site.depth(o.reshape(-1, 8), h.reshape(-1, 8)).reshape(h.shape)
    assert site(h).shape == h.shape
    assert torch.equal(site.depth(o, h), flat)


def test_strided_stream() -> None:
    site = random_site(FracConfig(rate=4), 16)
    h = torch.randn(6, 3, 16, dtype=torch.float64)
    assert torch.equal(site(h.transpose(0, 1)), site(h).transpose(0, 1))
