"""A row of sites whose streams are computed again in backward: the same gradients, and what must not change before."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fc import HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.reference import Config
from megatron_fc.connections.stream_recompute import Link, Written
from support.family import random_site

TOKENS, WIDTH = 5, 8
CONFIGS: list[Config] = [
    HyperConfig(slots=3),
    HyperConfig(slots=4, fractions=2),
    ManifoldConfig(slots=3),
    ManifoldConfig(slots=2, fractions=2),
]


class Row:
    """Sites in a row, two of them a layer, each with a norm and a linear sub-layer; all that links are told is here."""

    def __init__(self, config: Config, sites: int = 5) -> None:
        torch.manual_seed(0)
        self.config = config
        self.sites = [random_site(config, WIDTH) for _ in range(sites)]
        self.norms = [nn.LayerNorm(WIDTH, dtype=torch.float64) for _ in range(sites)]
        self.linears = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(sites)]
        self.h = torch.randn(TOKENS, config.stream_width(WIDTH), dtype=torch.float64, requires_grad=True)
        self.kept: list[Tensor] = []  # streams and sub-layers' outputs, in turn

    def parameters(self) -> list[Tensor]:
        return [p for module in (*self.sites, *self.norms, *self.linears) for p in module.parameters()]

    def plain(self) -> Tensor:
        h = self.h * 1
        for site, norm, linear in zip(self.sites, self.norms, self.linears, strict=True):
            x, handover = site(h, norm, hand_over=True)
            h = site.depth(linear(x), h, handover)
        return h

    def linked(self) -> Tensor:
        h, written = self.h * 1, None
        for number, (site, norm, linear) in enumerate(zip(self.sites, self.norms, self.linears, strict=True)):
            link = Link(site, norm, h, written, begins_layer=number % 2 == 0)
            x, handover = link.width(h)
            o = linear(x)
            self.kept += [h, o]
            h, written = site.depth(o, h, handover), link.written(o)
        return h

    def gradients(self, stream: Tensor, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(stream.square().sum(), [self.h, *self.parameters()], **options))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=[config.label for config in CONFIGS])
def test_gradients_are_equal_to_the_bit(config: Config, layers: int) -> None:
    row = Row(replace(config, stream_layers=layers))
    expected, found = row.plain(), row.linked()
    assert torch.equal(expected, found)
    assert all(map(torch.equal, row.gradients(found), row.gradients(expected)))


def test_a_graph_can_be_gone_through_again() -> None:
    row = Row(HyperConfig(slots=3, stream_layers=3))
    stream = row.linked()
    first = row.gradients(stream, retain_graph=True)
    assert all(map(torch.equal, row.gradients(stream), first))


def test_a_second_derivative_is_refused_as_without() -> None:
    row = Row(HyperConfig(slots=3, stream_layers=3))
    [gradient] = torch.autograd.grad(row.linked().square().sum(), [row.h], create_graph=True)
    with pytest.raises(UserError, match="differentiated by hand and once"):
        gradient.sum().backward()


def write_to_kept_stream(row: Row) -> None:
    row.kept[0].detach().mul_(2)


def write_to_output(row: Row) -> None:
    row.kept[3].detach().mul_(2)


def step_site(row: Row) -> None:
    with torch.no_grad():
        next(iter(row.sites[1].parameters())).mul_(2)


def step_norm(row: Row) -> None:
    with torch.no_grad():
        row.norms[4].weight.mul_(2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (write_to_kept_stream, "was written to in place: write to a copy"),
        (write_to_output, "was written to in place: write to a copy"),
        (step_site, "was changed between the forward and the backward pass"),
        (step_norm, "was changed between the forward and the backward pass"),
    ],
)
def test_what_it_computes_from_must_not_change(change: Callable[[Row], None], sentence: str) -> None:
    row = Row(HyperConfig(slots=3, stream_layers=3))
    stream = row.linked()
    change(row)
    with pytest.raises(UserError, match=sentence):
        row.gradients(stream)


def test_a_stream_between_may_be_written_to() -> None:
    """It is computed again from what it came from, where autograd would have lost it."""
    row = Row(HyperConfig(slots=3, stream_layers=3))
    expected = row.gradients(row.plain())
    stream = row.linked()
    row.kept[4].detach().mul_(2)
    assert all(map(torch.equal, row.gradients(stream), expected))


def replace_x(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * 2,)


def write_to_x(_: nn.Module, inputs: tuple[Tensor]) -> None:
    inputs[0].mul_(2)


@pytest.mark.parametrize("hook", [replace_x, write_to_x])
def test_x_that_a_hook_of_the_norm_changes_is_kept_as_it_is(hook: Callable[..., Any]) -> None:
    row = Row(HyperConfig(slots=3, stream_layers=3))
    for norm in row.norms:
        norm.register_forward_pre_hook(hook)
    assert all(map(torch.equal, row.gradients(row.linked()), row.gradients(row.plain())))


def test_norms_that_keep_x_in_another_shape_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformer Engine's do, flat."""

    class Flat(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(-1, WIDTH)).view(x.shape)

    computed: list[Link] = []
    compute = Link._input
    monkeypatch.setattr(Link, "_input", lambda link: (computed.append(link), compute(link))[1])
    row = Row(HyperConfig(slots=3, stream_layers=3))
    row.h = torch.randn(TOKENS, 2, row.h.shape[-1], dtype=torch.float64, requires_grad=True)
    row.norms = [Flat(WIDTH, dtype=torch.float64) for _ in row.norms]
    expected = row.gradients(row.plain())
    assert all(map(torch.equal, row.gradients(row.linked()), expected))
    assert len({id(link) for link in computed}) == 5


def test_where_nothing_is_known_of_a_stream_a_group_begins() -> None:
    site, norm, h = random_site(HyperConfig(slots=3, stream_layers=2), WIDTH), nn.LayerNorm(WIDTH), torch.randn(2, 24)

    def after(link: Link, layer: bool) -> Link:
        return Link(site, norm, h, Written(link, link.written(h).o), layer)

    first = Link(site, norm, h, None, begins_layer=False)
    second = after(first, False)
    third = after(second, True)
    assert [link._written is None for link in (first, second, third, after(third, False), after(third, True))] == [
        True,
        False,
        False,
        False,
        True,
    ]
