"""Hyper-Connections against loops over streams in fp64, and against the Frac-Connection that they are at n = 1."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fc import FracConfig, FracConnection
from megatron_fc.connections import HyperConfig
from megatron_fc.connections.hyper import HyperConnection
from megatron_fc.errors import UserError

OPTIONS: list[dict[str, Any]] = [
    {"dynamic": False},
    {},
    {"norm": "layernorm"},
    {"norm": "none", "tanh": False, "scale": False},
]
TOKENS, WIDTH = 5, 6


def random_site(slots: int, **options: Any) -> HyperConnection:
    """Coefficients without any symmetry."""
    torch.manual_seed(slots)
    site = HyperConnection(WIDTH, HyperConfig(slots=slots, **options), sub_layer=1).double()
    with torch.no_grad():
        for parameter in site.parameters():
            parameter += torch.randn_like(parameter)
    return site


def by_loops(site: HyperConnection, streams: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """x [d] and the next streams [n*d] of one token with streams [n, d], written out from the paper's equations."""
    config, n = site.config, len(streams)
    beta, gamma, alpha = site.static_beta.clone(), site.static_gamma.clone(), site.static_alpha.view(n, n).clone()
    if config.dynamic:
        for i, h in enumerate(streams):
            if config.norm == "layernorm":
                h = h - h.mean()
            if config.norm != "none":
                h = h / (h.square().mean() + config.norm_eps).sqrt() * site.norm_weight
            z = torch.stack([(h * row).sum() for row in site.dynamic_weight])
            z = z.tanh() if config.tanh else z
            beta[i] += z[0] * (site.scale_beta[0] if config.scale else 1)
            gamma[i] += z[1] * (site.scale_alpha[0] if config.scale else 1)
            alpha[i] += z[2:] * (site.scale_alpha[0] if config.scale else 1)
    x = sum(gamma[i] * streams[i] for i in range(n))
    following = [beta[j] * o + sum(alpha[i, j] * streams[i] for i in range(n)) for j in range(n)]
    return x, torch.cat(following)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_as_loops(n: int, options: dict[str, Any]) -> None:
    site = random_site(n, **options)
    h, o = torch.randn(TOKENS, n * WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    with torch.no_grad():
        x, handover = site(h, hand_over=True)
        following = site.depth(o, h, handover)
        tokens = [by_loops(site, *token) for token in zip(h.view(TOKENS, n, WIDTH), o, strict=True)]
        assert torch.equal(site(h), x)
        assert torch.equal(site.depth(o, h), following), "computed again from h"
    for found, expected in zip((x, following), zip(*tokens, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("matrix", ["static_alpha", "dynamic_weight"])
def test_streams_in_the_wrong_order_would_be_noticed(matrix: str) -> None:
    site, n = random_site(4), 4
    h, o = torch.randn(TOKENS, n * WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    with torch.no_grad():
        before = site.depth(o, h)
        parameter = site.get_parameter(matrix)
        swapped = parameter.view(n, n).t().flatten() if matrix == "static_alpha" else parameter.flip(0)
        parameter.copy_(swapped)
        assert (site.depth(o, h) - before).abs().max() > 0.1


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(options: dict[str, Any]) -> None:
    site = random_site(2, **options)
    h, o = (torch.randn(2, width).double().requires_grad_() for width in (2 * WIDTH, WIDTH))

    def step(h: Tensor, o: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in site.named_parameters()), parameters, strict=True))

        def of_site(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(site, named, args, kwargs)

        x, handover = of_site(h, hand_over=True)
        return site.leave(site.depth(o + x.sin(), h, handover))

    assert torch.autograd.gradcheck(step, (h, o, *site.parameters()))


@pytest.mark.parametrize("options", OPTIONS)
def test_one_stream_is_the_frac_connection_of_rate_1(options: dict[str, Any]) -> None:
    hyper, frac = random_site(1, **options), FracConnection(WIDTH, FracConfig(rate=1, **options)).double()
    frac.load_state_dict(hyper.state_dict())
    h, o = torch.randn(TOKENS, WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    assert torch.equal(hyper.enter(h), frac.enter(h))
    torch.testing.assert_close(hyper(h), frac(h))
    torch.testing.assert_close(hyper.depth(o, h), frac.depth(o, h))
    assert torch.equal(hyper.leave(h), frac.leave(h))


def test_the_streams_are_copies_and_their_mean() -> None:
    site = random_site(4)
    h = torch.randn(3, TOKENS, WIDTH).double()
    stream = site.enter(h)
    assert stream.shape == (3, TOKENS, 4 * WIDTH)
    assert all(torch.equal(part, h) for part in stream.split(WIDTH, dim=-1))
    parts = torch.randn(4, 3, TOKENS, WIDTH).double()
    torch.testing.assert_close(site.leave(torch.cat(list(parts), dim=-1)), parts.mean(0))


def test_starts_as_the_residual_network() -> None:
    """Every stream is h, which goes to the sub-layer, and o is added to every one."""
    h, o = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    for sub_layer in range(5):
        site = HyperConnection(WIDTH, HyperConfig(slots=4), sub_layer)
        assert site.static_gamma.tolist() == [float(i == sub_layer % 4) for i in range(4)]
        stream = site.enter(h)
        assert torch.equal(site(stream), h)
        assert torch.equal(site.depth(o, stream), site.enter(h + o))


def test_the_norm_is_applied_to_the_input() -> None:
    site, norm = random_site(2), torch.nn.LayerNorm(WIDTH).double()
    h = torch.randn(TOKENS, 2 * WIDTH).double()
    assert torch.equal(site(h, norm=norm), norm(site(h)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"slots": 0}, "slots must be a whole number of at least 1, not 0: use 4"),
        ({"slots": 2.0}, "slots must be a whole number of at least 1, not 2.0"),
        ({"norm": "rmsnrm"}, "unknown norm 'rmsnrm': did you mean 'rmsnorm'"),
        ({"tanh": "yes"}, "tanh must be true or false, not 'yes'"),
        ({"initial_scale": float("inf")}, "initial_scale must be a finite number, not inf"),
        ({"norm_eps": -1.0}, "norm_eps must be greater than 0, not -1.0: use 1e-5"),
        ({"dynamic": False, "norm": "none"}, "norm='none' has no effect on static connections"),
        ({"scale": False, "initial_scale": 1.0}, "initial_scale=1.0 has no effect with scale=false"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        HyperConfig(**values)


def test_labels() -> None:
    assert HyperConfig(slots=4).label == "dhc_x4"
    assert HyperConfig(slots=2, dynamic=False).label == "shc_x2"


@pytest.mark.parametrize(("n", "total"), [(2, 256), (4, 768)])
def test_static_parameters_of_the_papers_model(n: int, total: int) -> None:
    """n(n+2) per site; with a norm's weight, d + d(n+2) + n(n+2) + 2, of which the paper's norm has none."""
    assert 32 * HyperConfig(slots=n, dynamic=False).parameter_count(2048) == total
    assert HyperConfig(slots=n).parameter_count(2048) == 2048 + 2048 * (n + 2) + n * (n + 2) + 2


def test_dhc_x4_of_olmo_1b() -> None:
    with_norm, without = HyperConfig(slots=4), HyperConfig(slots=4, norm="none")
    assert 32 * with_norm.parameter_count(2048) == 459_584
    assert 32 * without.parameter_count(2048) == 394_048  # as the paper prints: its norm has no parameters
