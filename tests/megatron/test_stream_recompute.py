"""Recompute of the stream in real models: losses and gradients to the bit, and what is alive before backward."""

import gc
import itertools
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_fc import HyperConfig, ManifoldConfig
from megatron_fc.connections import eager
from megatron_fc.connections.reference import Config
from megatron_fc.connections.stream_recompute import Link
from support import tiny
from support.living import living

DHC, MHC = HyperConfig(slots=4), ManifoldConfig(slots=4)
BETWEEN, MFC = HyperConfig(slots=4, fractions=2), ManifoldConfig(slots=4, fractions=4)
WIDE = pytest.mark.parametrize("config", [DHC, MHC], ids=["dhc", "mhc"])
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def build(kind: str, config: Config, hand_over: bool = True, **options: Any) -> torch.nn.Module:
    model = (tiny.build if hand_over else tiny.build_without_hand_over)(kind, config, **{**DROPOUT, **options})
    tiny.randomise_connections(model)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Loss, under that name, and every parameter's gradient, with fixed dropout."""
    tiny.seed_dropout(3)
    loss = tiny.loss(model, tiny.tokens())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def different(kind: str, config: Config, layers: int, **options: Any) -> list[str]:
    """What differs with the stream kept once for so many layers."""
    one, other = (gradients(build(kind, c, **options)) for c in (config, replace(config, stream_layers=layers)))
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *((kind, DHC) for kind in tiny.KINDS),
        ("mixed", MHC),
        ("mtp", MHC),
        ("hybrid", MHC),
        ("moe", BETWEEN),
        ("mla", MFC),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label,
)
def test_exact(kind: str, config: Config) -> None:
    assert not different(kind, config, layers=2)


@WIDE
def test_exact_in_bf16(config: Config) -> None:
    assert not different("mixed", config, layers=2, **BF16)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_exact_in_groups_that_do_not_divide_the_layers(layers: int) -> None:
    assert not different("dense", DHC, layers, num_layers=3)


@pytest.mark.parametrize("modules", [["core_attn"], ["moe"], ["mlp"], ["core_attn", "moe", "mlp"]])
def test_exact_with_megatrons_selective_recompute(modules: list[str]) -> None:
    assert not different("mixed", DHC, 2, recompute_granularity="selective", recompute_modules=modules)


def test_exact_where_norm_slots_return_no_stream() -> None:
    """As those of Mamba layers: each depth connection looks at h by itself."""
    assert not different("mixed", DHC, 2, hand_over=False)


def change_result(*call: Any) -> Any:
    result = call[-1]
    return result * 1.5 if torch.is_tensor(result) else (result[0] * 1.5, *result[1:])


def write_to_stream(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    inputs[0].mul_(1.5)


@pytest.mark.parametrize(
    ("observed", "before"),
    [
        ("pre_mlp_layernorm.connection", False),
        ("pre_mlp_layernorm.connection", True),
        ("pre_mlp_layernorm.norm", False),
        ("pre_mlp_layernorm", True),
        ("", False),
    ],
)
def test_exact_where_somebody_changes_what_he_sees(observed: str, before: bool) -> None:
    def gradients_of(config: Config) -> dict[str, torch.Tensor]:
        model = build("dense", config)
        for layer in model.decoder.layers:
            module = layer.get_submodule(observed)
            if before:
                module.register_forward_pre_hook(write_to_stream)
            else:
                module.register_forward_hook(change_result)
        return gradients(model)

    one, other = gradients_of(DHC), gradients_of(replace(DHC, stream_layers=2))
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_an_error_in_what_is_computed_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the mixing is off by 1e-6 once the forward pass is over."""
    expected = gradients(build("mixed", DHC))
    mix, calls, in_forward = eager._mix, itertools.count(1), 8  # two at each of four sites

    def drifting(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return mix(weights, rows) * (1 if next(calls) <= in_forward else 1 + 1e-6)

    monkeypatch.setattr(eager, "_mix", drifting)
    found = gradients(build("mixed", replace(DHC, stream_layers=2)))
    assert torch.equal(found["loss"], expected["loss"]), "the forward pass itself was disturbed"
    assert sum(not torch.equal(found[name], expected[name]) for name in found) > len(found) // 2


def kept(config: Config, **options: Any) -> int:
    """Bytes alive between forward and backward pass of four layers."""
    model = build("dense", config, num_layers=4, normalization="LayerNorm", **options)
    tiny.loss(model, tiny.tokens()).backward()  # what the first pass leaves for the next ones
    with living() as made:
        loss = tiny.loss(model, tiny.tokens())
    assert loss.requires_grad
    gc.collect()  # Python may still hold what nobody refers to
    return made.living_bytes()


@pytest.mark.parametrize(
    ("config", "options", "groups"),
    [
        pytest.param(DHC, {}, (1, 2, 3, 4), id="dhc"),
        pytest.param(DHC, BF16, (2,), id="bf16", marks=pytest.mark.slow),
        pytest.param(MHC, {}, (3,), id="mhc"),
        pytest.param(BETWEEN, {}, (1,), id="between", marks=pytest.mark.slow),
        pytest.param(MFC, {}, (2,), id="mfc", marks=pytest.mark.slow),
    ],
)
def test_a_group_keeps_one_stream_and_no_input_of_a_norm(
    config: Config, options: dict[str, Any], groups: tuple[int, ...]
) -> None:
    """Of L layers 2L streams of r rows and 2L inputs of norms, or L/k streams; all else is the same.

    To less than a row: once, in a full run, something of Megatron's with 128 bytes was alive in one of the two.
    """
    row = 2 * tiny.SEQUENCE * tiny.WIDTH * (2 if options else 4)
    r, layers = config.slots // config.fractions, 4
    without = kept(config, **options)
    for k in groups:
        spared = 2 * layers * (r + 1) - r * math.ceil(layers / k)
        found = without - kept(replace(config, stream_layers=k), **options)
        assert abs(found - spared * row) < row / 2, k


@WIDE
def test_every_stream_is_computed_again_once_and_goes_with_its_layer(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"width_forward": 0, "depth_forward": 0}
    for name in calls:
        monkeypatch.setattr(eager, name, counted(getattr(eager, name), calls))
    model = build("dense", replace(config, stream_layers=2), num_layers=4)
    links = remembered(monkeypatch)
    alive: list[int] = []

    def count_computed(_: torch.Tensor) -> None:
        alive.append(sum(link._x is not None for link in links))

    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda *call: call[-1][0].register_hook(count_computed) and None)
    gradients(model)
    assert alive == [0, 2, 0, 2], "in front of each layer's backward pass, last layer first"
    assert not links
    assert calls == {"width_forward": 8 + 8, "depth_forward": 8 + 8 - 2}


def remembered(monkeypatch: pytest.MonkeyPatch) -> "weakref.WeakSet[Link]":
    """All links from now on, as long as something else holds them."""
    links: weakref.WeakSet[Link] = weakref.WeakSet()
    initialise = Link.__init__
    monkeypatch.setattr(Link, "__init__", lambda link, *args: (links.add(link), initialise(link, *args))[1])
    return links


def counted(function: Any, calls: dict[str, int]) -> Any:
    def count(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return count


def test_an_evaluation_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    links = remembered(monkeypatch)
    model = build("dense", replace(DHC, stream_layers=2))
    with torch.no_grad():
        tiny.loss(model, tiny.tokens())
    assert not links
    loss = tiny.loss(model, tiny.tokens())
    assert len(links) == 4
    loss.backward()
    assert not links
