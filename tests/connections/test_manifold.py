"""mHC and mFC: the manifold, initial values, what tells streams apart, and the implementations that people run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fc import ManifoldConfig, UserError
from megatron_fc.connections import mhc_tensors, reference
from support.family import MANIFOLD, name, random_site, random_streams

WIDTH = 12


@pytest.mark.parametrize("config", MANIFOLD[:-1], ids=name)
def test_alpha_is_doubly_stochastic(config: ManifoldConfig) -> None:
    site, (h, _) = random_site(config, WIDTH), random_streams(config, WIDTH, 50)
    s, p = reference.slots(h, config.slots), site.site_parameters()
    alpha, gamma, beta = (table(s, p, config) for table in (reference.alpha, reference.gamma, reference.beta))
    assert (alpha >= 0).all()
    torch.testing.assert_close(alpha.sum(-2), torch.ones_like(alpha.sum(-2)), rtol=0, atol=2e-6)  # columns, last
    rows = (alpha.sum(-1) - 1).abs()
    assert rows.median() < 1e-5
    assert rows.max() < 0.1  # as far as 20 normalisations take steep tables
    assert ((gamma > 0) & (gamma < 1 + 1e-5)).all()
    assert ((beta > 0) & (beta < 2)).all()


def test_initial_values_of_mhc() -> None:
    torch.manual_seed(0)
    site: Any = ManifoldConfig(slots=4).build(WIDTH)
    assert site.mapping_scale.tolist() == pytest.approx([0.01] * 3)
    assert not site.mapping_bias.any()
    bound = (6 / (24 + 4 * WIDTH)) ** 0.5  # Xavier: of rows and columns
    assert site.mapping_weight.abs().max().item() <= bound
    assert site.mapping_weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_initial_values_of_mfc_are_close_to_the_identity() -> None:
    """The deviations that docs/design.md names, at a stream of order one."""
    torch.manual_seed(0)
    site: Any = ManifoldConfig(slots=4, fractions=4).build(256)
    h, o = torch.randn(2, 100, 256)
    assert not site.mapping_bias[16:20].any()
    x, after = site(h).detach(), site.depth(o, h).detach()
    assert 0.01 < float((x - h).norm() / h.norm()) < 0.05
    assert 0.0005 < float((after - h - o).norm() / h.norm()) < 0.02


@pytest.mark.parametrize("n", [2, 3, 4])
def test_start_as_residual(n: int) -> None:
    config = ManifoldConfig(slots=n)
    site: Any = config.build(WIDTH)
    site.start_as_residual()
    assert all(config.is_identity(key, p) for key, p in site.named_parameters())
    assert all(config.is_identity(key, torch.stack([p, p])) for key, p in site.named_parameters())
    h, o = torch.randn(2, 50, WIDTH)
    stream = site.enter(h)
    # The epsilons: n * 1e-6 of gamma, 1e-6 of alpha's columns, on values of up to 4.
    torch.testing.assert_close(site(stream), h, rtol=0, atol=2e-5)
    torch.testing.assert_close(site.leave(site.depth(o, stream)), h + o, rtol=0, atol=1e-5)
    with torch.no_grad():
        site.mapping_bias[0] += 1e-3
    assert not config.is_identity("mapping_bias", site.mapping_bias)
    assert not config.is_identity("mapping_scale", torch.tensor([0, 0, 1e-9]))


@pytest.mark.parametrize("config", [ManifoldConfig(slots=4, fractions=4), ManifoldConfig(slots=1)], ids=name)
def test_what_never_is_the_residual_network(config: ManifoldConfig) -> None:
    site: Any = config.build(WIDTH)
    with pytest.raises(UserError, match=f"{config.label} is never the residual network"):
        site.start_as_residual()
    assert not any(config.is_identity(key, torch.zeros_like(p)) for key, p in site.named_parameters())


class Toy(nn.Module):
    """Three sub-layers between mHC sites."""

    def __init__(self, config: ManifoldConfig) -> None:
        super().__init__()
        self.sites = nn.ModuleList(config.build(WIDTH, k) for k in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.last = config.build_leave(WIDTH)

    def streams(self, h: Tensor) -> Tensor:
        h = self.sites[0].enter(h)
        for site, layer in zip(self.sites, self.layers, strict=True):
            x, handover = site(h, hand_over=True)
            h = site.depth(layer(x), h, handover)
        return h

    def train_steps(self, count: int) -> list[float]:
        generator = torch.Generator().manual_seed(3)
        h, target = (torch.randn(64, WIDTH, generator=generator) for _ in range(2))
        optimizer, losses = torch.optim.Adam(self.parameters(), lr=1e-2), []
        for _ in range(count):
            loss = (self.last(self.streams(h)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def spread(self) -> float:
        """How far the streams are apart, relative to their size."""
        h = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(4))
        streams = self.streams(h).detach().unflatten(-1, (-1, WIDTH))
        return float((streams - streams.mean(-2, keepdim=True)).norm() / streams.norm())


@pytest.mark.parametrize("upcycled", [False, True])
def test_streams_differ_after_ten_steps(upcycled: bool) -> None:
    torch.manual_seed(0)
    toy = Toy(ManifoldConfig(slots=4))
    if upcycled:
        for site in toy.sites:
            site.start_as_residual()
        assert toy.spread() < 1e-6
    losses = toy.train_steps(10)
    assert losses[-1] < losses[0]
    assert toy.spread() > 1e-3


def test_a_mapping_of_zeros_keeps_the_streams_equal_while_the_loss_falls() -> None:
    """The counter-example to `mapping_weight` at zero: nothing shows in the loss."""
    torch.manual_seed(0)
    toy = Toy(ManifoldConfig(slots=4))
    for site in toy.sites:
        nn.init.zeros_(site.mapping_weight)
    losses = toy.train_steps(10)
    assert losses[-1] < losses[0]
    assert toy.spread() < 1e-6


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"slots": 0}, "slots must be a whole number of at least 1, not 0"),
        ({"slots": 4, "fractions": 2}, r"fractions=2 is neither 1 \(mHC\) nor slots=4 \(mFC\)"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations must be a whole number of at least 1, not 0: use 20"),
        ({"sinkhorn_eps": 0.0}, "sinkhorn_eps must be greater than 0, not 0.0: use 1e-6"),
        ({"norm_eps": -1.0}, "norm_eps must be greater than 0, not -1.0"),
        ({"leave": "sum"}, "unknown leave 'sum'"),
        ({"slots": 4, "fractions": 4, "leave": "learned"}, "leave=learned has nothing to choose from in mfc_x4"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ManifoldConfig(**values)


def test_labels_and_counts() -> None:
    assert (ManifoldConfig(slots=4).label, ManifoldConfig(slots=2, fractions=2).label) == ("mhc_x4", "mfc_x2")
    assert ManifoldConfig(slots=4).parameter_count(2048) == (4 + 4 + 16) * (4 * 2048 + 1) + 3
    assert ManifoldConfig(slots=4, fractions=4).parameter_count(2048) == (16 + 4 + 16) * (2048 + 1) + 3


# Against transformers, and Megatron-LM's names.


def deepseek(n: int, end: bool = False) -> nn.Module:
    """Its module with weights of order one, and the configuration's defaults of the model that ships them."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=64, hc_mult=n, hc_eps=1e-6, hc_sinkhorn_iters=20, rms_norm_eps=1e-6)
    theirs = (modeling.DeepseekV4HyperHead if end else modeling.DeepseekV4HyperConnection)(config)
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for parameter in theirs.parameters():
            wide = parameter.dim() > 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (8**-0.5 if wide else 1.0))
    return theirs


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("n", [2, 4])
def test_equals_deepseek_v4_in_transformers(n: int) -> None:
    """Coefficients, outputs and gradients, to the rounding of fp32 chains through Sinkhorn's 40 normalisations."""
    theirs = deepseek(n)
    ours: Any = ManifoldConfig(slots=n).build(64)
    ours.load_state_dict(mhc_tensors.from_transformers(theirs.state_dict()))
    streams, o = random(3, 5, n, 64, seed=1), random(3, 5, 64, seed=2)
    post, comb, collapsed = theirs(streams)
    following = post.unsqueeze(-1) * o.unsqueeze(-2) + comb.transpose(-1, -2) @ streams  # as its decoder layer does
    h = streams.detach().flatten(-2).requires_grad_()
    x, handover = ours(h, hand_over=True)
    stream = ours.depth(o, h, handover)

    def equal(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance

    equal(handover.beta.view(3, 5, n), post)
    equal(handover.alpha.view(3, 5, n, n), comb)
    equal(x, collapsed)
    equal(stream.unflatten(-1, (n, 64)), following)
    g_x, g_h = random(3, 5, 64, seed=3).detach(), random(3, 5, n, 64, seed=4).detach()
    expected = torch.autograd.grad([collapsed, following], [streams, o, *theirs.parameters()], [g_x, g_h])
    found = torch.autograd.grad([x, stream], [h, o, *ours.parameters()], [g_x, g_h.flatten(-2)])
    for a, b in zip(found, (expected[0].flatten(-2), *expected[1:]), strict=True):
        equal(a, b, 1e-5)  # sums over 15 tokens of up to 8192 terms that cancel


@pytest.mark.parametrize("n", [2, 4])
def test_the_learned_leave_equals_deepseek_v4s_head(n: int) -> None:
    theirs = deepseek(n, end=True)
    ours = ManifoldConfig(slots=n, leave="learned").build_leave(64)
    ours.load_state_dict(mhc_tensors.from_transformers(theirs.state_dict()))
    streams = random(3, 5, n, 64, seed=1)
    torch.testing.assert_close(ours(streams.flatten(-2)), theirs(streams), rtol=1e-5, atol=1e-5)


def test_tensors_of_megatron_dev() -> None:
    n, width = 4, 8
    theirs = {
        "mapping_proj.weight": torch.randn(n * (n + 2), n * width),
        "alpha_pre": torch.tensor([1.0]),
        "alpha_post": torch.tensor([2.0]),
        "alpha_res": torch.tensor([3.0]),
        "bias": torch.randn(n * (n + 2)),
    }
    ours: Any = ManifoldConfig(slots=n).build(width)
    ours.load_state_dict(mhc_tensors.from_megatron(theirs))
    assert torch.equal(ours.mapping_weight, theirs["mapping_proj.weight"])
    assert torch.equal(ours.mapping_bias, theirs["bias"])
    assert ours.mapping_scale.tolist() == [1, 2, 3]
    end = {"hc_head_fn": torch.randn(n, n * width), "hc_head_base": torch.randn(n), "hc_head_scale": torch.ones(1)}
    leave = ManifoldConfig(slots=n, leave="learned").build_leave(width)
    leave.load_state_dict(mhc_tensors.from_megatron(end))
    assert torch.equal(leave.get_parameter("leave_weight"), end["hc_head_fn"])
    with pytest.raises(UserError, match=r"these are not the tensors of mHC: found .*alpha_pre"):
        mhc_tensors.from_megatron({key: theirs[key] for key in ("alpha_pre", "bias")})
    with pytest.raises(UserError, match=r"expected .*'base', 'fn', 'scale'"):
        mhc_tensors.from_transformers(theirs)
