"""Hyper-Connections and the shapes between: initial values, counts, and at n = 1 the Frac-Connection that they are."""

from typing import Any

import pytest
import torch

from megatron_fc import FracConfig, HyperConfig, UserError
from support.family import random_site

OPTIONS: list[dict[str, Any]] = [
    {"dynamic": False},
    {},
    {"norm": "layernorm"},
    {"norm": "none", "tanh": False, "scale": False},
]
TOKENS, WIDTH = 5, 6


@pytest.mark.parametrize("options", OPTIONS)
def test_one_stream_is_the_frac_connection_of_rate_1_to_the_bit(options: dict[str, Any]) -> None:
    hyper = random_site(HyperConfig(slots=1, **options), WIDTH)
    frac: Any = FracConfig(rate=1, **options).build(WIDTH)
    frac.double().load_state_dict(hyper.state_dict())
    h, o = torch.randn(TOKENS, WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    assert torch.equal(hyper.enter(h), frac.enter(h))
    assert torch.equal(hyper(h), frac(h))
    assert torch.equal(hyper.depth(o, h), frac.depth(o, h))
    assert torch.equal(hyper.leave(h), frac.leave(h))


def test_starts_as_the_residual_network_to_the_bit() -> None:
    """Every stream is h, of which the sub-layer takes the next one each time, and o is added to every one."""
    h, o = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    for sub_layer in range(5):
        site: Any = HyperConfig(slots=4).build(WIDTH, sub_layer)
        assert site.static_gamma.tolist() == [float(i == sub_layer % 4) for i in range(4)]
        stream = site.enter(h)
        assert torch.equal(site(stream), h)
        assert torch.equal(site.depth(o, stream), site.enter(h + o))
        assert torch.equal(site.leave(stream), h)


@pytest.mark.parametrize(("n", "m"), [(4, 2), (6, 3), (6, 2)])
def test_the_shape_between_starts_as_the_residual_network_to_the_bit(n: int, m: int) -> None:
    h, o = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    for sub_layer in range(3):
        site: Any = HyperConfig(slots=n, fractions=m).build(WIDTH, sub_layer)
        assert torch.equal(site.static_gamma.view(n, m), torch.eye(n)[:, :m]), "[I; 0] in every sub-layer"
        stream = site.enter(h)
        assert stream.shape == (TOKENS, n * WIDTH // m)
        assert torch.equal(site(stream), h)
        assert torch.equal(site.depth(o, stream), site.enter(h + o))


def test_parameters_start_anew() -> None:
    site: Any = HyperConfig(slots=4, initial_scale=0.25).build(WIDTH, sub_layer=6)
    before = {name: p.clone() for name, p in site.named_parameters()}
    for parameter in site.parameters():
        torch.nn.init.normal_(parameter)
    site.reset_parameters()
    assert all(torch.equal(p, before[name]) for name, p in site.named_parameters())
    assert site.scale_beta.item() == site.scale_alpha.item() == 0.25
    assert site.static_gamma.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"slots": 0}, "slots must be a whole number of at least 1, not 0: use 4"),
        ({"slots": 2.0}, "slots must be a whole number of at least 1, not 2.0"),
        ({"slots": 5, "fractions": 2}, "slots=5 is no multiple of fractions=2: use slots=6"),
        ({"slots": 2, "fractions": 4}, "slots=2 is no multiple of fractions=4: use slots=4"),
        ({"slots": 4, "fractions": 4}, r"are a Frac-Connection: use dfc or sfc, FracConfig\(rate=4\)"),
        ({"fractions": 0}, "fractions must be a whole number of at least 1, not 0"),
        ({"norm": "rmsnrm"}, "unknown norm 'rmsnrm': did you mean 'rmsnorm'"),
        ({"tanh": "yes"}, "tanh must be true or false, not 'yes'"),
        ({"initial_scale": float("inf")}, "initial_scale must be a finite number, not inf"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 1e-30, not -1.0: use 1e-5"),
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
    assert HyperConfig(slots=4, fractions=2).label == "dhc_x4_m2"
    assert HyperConfig(slots=8, fractions=2, dynamic=False).label == "shc_x8_m2"


@pytest.mark.parametrize(("n", "total"), [(2, 256), (4, 768)])
def test_static_parameters_of_the_papers_model(n: int, total: int) -> None:
    """n(n+2) per site; with a norm's weight, d + d(n+2) + n(n+2) + 2, of which the paper's norm has none."""
    assert 32 * HyperConfig(slots=n, dynamic=False).parameter_count(2048) == total
    assert HyperConfig(slots=n).parameter_count(2048) == 2048 + 2048 * (n + 2) + n * (n + 2) + 2


def test_dhc_x4_of_olmo_1b() -> None:
    with_norm, without = HyperConfig(slots=4), HyperConfig(slots=4, norm_affine=False)
    assert with_norm.parameter_count(2048) == 14_362
    assert 32 * with_norm.parameter_count(2048) == 459_584
    assert 32 * without.parameter_count(2048) == 394_048  # as the paper prints: its norm has no parameters


def test_the_shape_between_counts_in_slots() -> None:
    """n + nm + nn statics, (1+m+n)c of W, two scales, c of the norm."""
    assert HyperConfig(slots=4, fractions=2).parameter_count(2048) == 4 + 8 + 16 + 7 * 1024 + 2 + 1024
