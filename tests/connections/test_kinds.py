"""The contract of connections: shapes, counts, identity, and how kinds are told from each other."""

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_fc import UserError
from megatron_fc.connections import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import KINDS, from_label, is_connection_key, member, overrides, recognise
from megatron_fc.connections.per_slot import PerSlotParameters

D = 48
MEMBERS: list[ConnectionConfig] = [
    *(FracConfig(rate=m, dynamic=dynamic) for m in (1, 2, 3, 4) for dynamic in (True, False)),
    FracConfig(rate=2, norm="none"),
    FracConfig(rate=2, scale=False),
    FracConfig(rate=4, norm="none", scale=False),
    *(HyperConfig(slots=n, dynamic=dynamic) for n in (2, 3, 4) for dynamic in (True, False)),
    HyperConfig(slots=2, norm="none", scale=False),
    HyperConfig(slots=4, fractions=2),
    HyperConfig(slots=6, fractions=3, dynamic=False),
    HyperConfig(slots=6, fractions=2, dynamic_beta=False),
    FracConfig(rate=4, dynamic_alpha=False),
]
ON_MANIFOLD: list[ConnectionConfig] = [
    *(ManifoldConfig(slots=n) for n in (1, 2, 3, 4, 8)),
    *(ManifoldConfig(slots=n, fractions=n) for n in (2, 3, 4, 8)),
    ManifoldConfig(slots=4, leave="learned"),
]


def test_the_registry_names_every_kind() -> None:
    assert {"frac": FracConfig, "hyper": HyperConfig, "manifold": ManifoldConfig} == KINDS
    assert FracConfig.parameter_names == HyperConfig.parameter_names == PerSlotParameters._fields


def test_frac_connections_have_as_many_slots_as_fractions() -> None:
    config = FracConfig(rate=4)
    assert (config.kind, config.slots, config.fractions) == ("frac", 4, 4)
    assert (config.slot_width(D), config.stream_width(D)) == (12, D)
    assert config.parameter_shapes(D) == {
        "static_beta": (4,),
        "static_gamma": (16,),
        "static_alpha": (16,),
        "dynamic_weight": (9, 12),
        "scale_beta": (1,),
        "scale_alpha": (1,),
        "norm_weight": (12,),
    }


def test_hyper_connections_have_slots_of_the_whole_width() -> None:
    config = HyperConfig(slots=4)
    assert (config.kind, config.slots, config.fractions) == ("hyper", 4, 1)
    assert (config.slot_width(D), config.stream_width(D)) == (D, 4 * D)
    assert config.parameter_shapes(D) == {
        "static_beta": (4,),
        "static_gamma": (4,),
        "static_alpha": (16,),
        "dynamic_weight": (6, D),
        "scale_beta": (1,),
        "scale_alpha": (1,),
        "norm_weight": (D,),
    }


@pytest.mark.parametrize("config", [*MEMBERS, *ON_MANIFOLD], ids=str)
@pytest.mark.parametrize("sub_layer", [0, 3])
def test_modules_have_the_parameters_of_their_configuration(config: ConnectionConfig, sub_layer: int) -> None:
    site = config.build(hidden_size=D, sub_layer=sub_layer)
    parameters = dict(site.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == config.parameter_shapes(D)
    assert list(parameters) == [name for name in config.parameter_names if name in parameters]
    assert sum(p.numel() for p in parameters.values()) == config.parameter_count(D)
    assert all(config.is_identity(name, p) for name, p in parameters.items()) == (config in MEMBERS)
    leave = {name: tuple(p.shape) for name, p in config.build_leave(D).named_parameters()}
    assert leave == config.leave_shapes(D)


@pytest.mark.parametrize("config", MEMBERS, ids=str)
def test_a_site_starts_as_a_residual_connection(config: ConnectionConfig) -> None:
    h, o = torch.randn(2, 5, D)
    for sub_layer in range(5):
        site = config.build(D, sub_layer)
        stream = site.enter(h)
        assert stream.shape == (5, config.stream_width(D))
        assert torch.equal(site(stream), h)
        torch.testing.assert_close(site.leave(site.depth(o, stream)), h + o)


@pytest.mark.parametrize("config", [*MEMBERS, *ON_MANIFOLD], ids=str)
def test_a_norm_and_a_hand_over_change_no_result(config: ConnectionConfig) -> None:
    site, norm = config.build(D), torch.nn.LayerNorm(D)
    for _, parameter in site.named_parameters():
        torch.nn.init.normal_(parameter)
    h, o = torch.randn(5, config.stream_width(D)), torch.randn(5, D)
    x, handover = site(h, norm=norm, hand_over=True)
    assert torch.equal(x, norm(site(h)))
    assert torch.equal(site.depth(o, h, handover), site.depth(o, h))


@pytest.mark.parametrize("config", [*MEMBERS, *ON_MANIFOLD], ids=str)
def test_kinds_are_recognised_by_their_parameters(config: ConnectionConfig) -> None:
    assert recognise(config.last_dimensions(D)) == config


@pytest.mark.parametrize("config", MEMBERS, ids=str)
def test_parameters_that_no_kind_has_are_not_recognised(config: ConnectionConfig) -> None:
    sizes = config.last_dimensions(D)
    assert recognise(sizes | {"static_alpha": sizes["static_alpha"] + 1}) is None
    assert recognise(sizes | {"other": 1}) is None
    assert recognise({name: size for name, size in sizes.items() if name != "static_beta"}) is None


@pytest.mark.parametrize("config", ON_MANIFOLD, ids=str)
def test_mappings_that_no_kind_has_are_not_recognised(config: ConnectionConfig) -> None:
    sizes = config.last_dimensions(D)
    assert recognise(sizes | {"mapping_bias": sizes["mapping_bias"] + 1}) is None
    assert recognise(sizes | {"mapping_scale": 2}) is None
    assert recognise(sizes | {"static_beta": 4}) is None
    assert recognise({name: size for name, size in sizes.items() if name != "mapping_bias"}) is None


def test_one_stream_goes_by_the_name_of_frac_connections() -> None:
    assert HyperConfig(slots=1).last_dimensions(D) == FracConfig(rate=1).last_dimensions(D)
    assert recognise(HyperConfig(slots=1).last_dimensions(D)) == FracConfig(rate=1)


def test_options_that_parameters_show_are_in_the_description() -> None:
    assert FracConfig(rate=4).description == "dfc_x4 connections"
    assert FracConfig(rate=4, norm="none").description == "dfc_x4 connections without norm"
    assert HyperConfig(slots=2, norm="none", scale=False).description == "dhc_x2 connections without scale and norm"
    assert HyperConfig(slots=2, dynamic=False).description == "shc_x2 connections"
    assert FracConfig(dynamic_beta=False).description == "dfc_x4 connections without dynamic beta"
    assert FracConfig(norm_affine=False).description == "dfc_x4 connections without a weight of the norm"
    assert ManifoldConfig().description == "mhc_x4 connections"
    assert ManifoldConfig(leave="learned").description == "mhc_x4 connections with leave=learned"


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).flatten()


NO_IDENTITY: list[tuple[ConnectionConfig, str, Tensor]] = [
    (FracConfig(rate=2), "static_beta", torch.tensor([1, 1.001])),
    (FracConfig(rate=2), "static_gamma", table([0, 1], [1, 0])),  # fractions swapped
    (FracConfig(rate=2), "static_gamma", table([1, 1e-6], [0, 1])),
    (FracConfig(rate=2), "static_alpha", table([1, 0], [1e-6, 1])),
    (FracConfig(rate=2), "dynamic_weight", torch.tensor([[0, 1e-9]])),
    (HyperConfig(slots=2), "static_gamma", table([1], [1])),  # twice the stream
    (HyperConfig(slots=2), "static_gamma", table([0.5], [0.5])),
    (HyperConfig(slots=2), "static_gamma", table([0], [0])),
]


@pytest.mark.parametrize(("config", "name", "values"), NO_IDENTITY)
def test_what_is_no_identity(config: ConnectionConfig, name: str, values: Tensor) -> None:
    assert not config.is_identity(name, values)
    fresh = dict(config.build(4).named_parameters())[name].detach()
    if values.shape == fresh.shape:
        assert config.is_identity(name, torch.stack([fresh, fresh]))
        assert not config.is_identity(name, torch.stack([fresh, values])), "one of several layers"


def test_an_input_from_any_stream_is_an_identity() -> None:
    assert HyperConfig(slots=2).is_identity("static_gamma", table([0], [1]))
    assert FracConfig().is_identity("scale_alpha", torch.tensor([7.0])), "W decides"


def test_keys_of_connections() -> None:
    assert is_connection_key("decoder.layers.0.input_layernorm.connection.static_beta")
    assert is_connection_key("optimizer.state.exp_avg.decoder.layers.input_layernorm.connection.norm_weight")
    assert is_connection_key("connection.scale_beta")
    assert not is_connection_key("decoder.layers.0.input_layernorm.norm_weight")
    assert not is_connection_key("decoder.layers.0.connection.weight")
    assert is_connection_key("decoder.layers.0.input_layernorm.connection.mapping_weight")
    assert is_connection_key("decoder.final_layernorm.connection.leave_weight")
    assert not is_connection_key("static_beta")


@pytest.mark.parametrize("config", [*MEMBERS, *ON_MANIFOLD], ids=str)
def test_a_label_names_its_member(config: ConnectionConfig) -> None:
    found = from_label(config.label)
    assert found is not None
    assert (type(found), found.slots, found.fractions) == (type(config), config.slots, config.fractions)
    assert found.label == config.label


@pytest.mark.parametrize(
    ("wanted", "other", "expected"),
    [
        (None, FracConfig(), "connection=residual"),
        (None, None, ""),
        (FracConfig(rate=2, tanh=False), None, "connection=dfc rate=2 tanh=false"),
        (FracConfig(), FracConfig(rate=2, norm="none", backend="torch"), "rate=4 norm=rmsnorm"),
        (FracConfig(), HyperConfig(), "connection=dfc"),
        (HyperConfig(), FracConfig(tanh=False), "connection=dhc tanh=true"),
        (HyperConfig(slots=4), HyperConfig(slots=4, fractions=2), "fractions=1"),
        (HyperConfig(slots=4, fractions=2), None, "connection=dhc rate=4 fractions=2"),
        (FracConfig(), HyperConfig(fractions=2, tanh=False), "connection=dfc tanh=true fractions=null"),
        (ManifoldConfig(), HyperConfig(fractions=2, stream_layers=2), "connection=mhc fractions=null"),
        (FracConfig(), HyperConfig(stream_layers=2), "connection=dfc stream_layers=0"),
        (HyperConfig(), FracConfig(recompute=True, backend="torch"), "connection=dhc recompute=false"),
        (FracConfig(), ManifoldConfig(), "connection=dfc"),
        (ManifoldConfig(leave="learned"), FracConfig(), "connection=mhc leave=learned"),
        (ManifoldConfig(slots=4, fractions=4), ManifoldConfig(), "connection=mfc"),
    ],
)
def test_overrides_turn_one_into_another(
    wanted: ConnectionConfig | None, other: ConnectionConfig | None, expected: str
) -> None:
    assert " ".join(overrides(wanted, other)) == expected


@pytest.mark.parametrize(
    "label", ["dfc", "dfc_x0", "dfc_x04", "xfc_x4", "dhc_x4_m", "dhc_x4_m0", "residual", "dfc_x4 "]
)
def test_what_is_no_label(label: str) -> None:
    assert from_label(label) is None


def test_members_take_the_options_of_their_kind() -> None:
    assert member("mhc", 2, None, {"leave": "learned"}) == ManifoldConfig(slots=2, leave="learned")
    assert member("shc", 8, 2) == HyperConfig(slots=8, fractions=2, dynamic=False)
    for arguments, sentence in {
        ("mhx",): "unknown connection 'mhx': did you mean 'mhc'?",
        ("hcd",): "unknown connection 'hcd': did you mean 'dhc'?",
        ("dfc", 0): "rate must be a whole number of at least 1, not 0: use 4",
        ("dfc", True): "rate must be a whole number of at least 1, not True: use 4",
        ("dhc", 4, 3): "rate=4 is no multiple of fractions=3: use rate=6",
        ("mhc", 4, 2): "fractions=2 is an option of shc and dhc: mhc_x4 has its own, drop it",
    }.items():
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            member(*arguments)


@pytest.mark.parametrize("kind", KINDS.values())
def test_unknown_options_are_refused_by_kind(kind: type[ConnectionConfig]) -> None:
    assert kind.from_dict(kind().to_dict()) == kind()
    with pytest.raises(UserError, match=f"unknown {kind.kind} option 'norm_epss': did you mean 'norm_eps'"):
        kind.from_dict({"norm_epss": 1e-5})


def test_configurations_load_neither_torch_nor_megatron() -> None:
    text = (
        "import sys, megatron_fc\n"
        "from megatron_fc.connections.kinds import KINDS, recognise\n"
        "from megatron_fc.connections.costs import flops, traffic\n"
        "for kind in KINDS.values():\n"
        "    assert recognise(kind().last_dimensions(64)) == kind()\n"
        "    assert flops.site(kind(), 64) > 0\n"
        "assert not {'torch', 'megatron', 'triton'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
