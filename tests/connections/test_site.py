"""What the modules of all kinds have in common: fp32 parameters, shapes that are checked, bias and dropout."""

from typing import Any

import pytest
import torch
from torch import nn

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.reference import Config
from support.family import name, random_site, random_streams

KINDS: list[Config] = [
    FracConfig(rate=2),
    HyperConfig(slots=4),
    HyperConfig(slots=4, fractions=2),
    ManifoldConfig(slots=4),
    ManifoldConfig(slots=2, fractions=2),
]
every_kind = pytest.mark.parametrize("config", KINDS, ids=name)
WIDTH = 8


@every_kind
def test_parameters_stay_fp32_through_a_cast(config: Config) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), random_site(config, WIDTH).float())  # type: ignore[arg-type]
    before = [p.clone() for p in model[1].parameters()]
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(p, q) for p, q in zip(model[1].parameters(), before, strict=True))
    assert {p.dtype for p in model.double()[1].parameters()} == {torch.float64}


@every_kind
def test_fp32_even_under_a_half_precision_default(config: Config) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        site: Any = config.build(WIDTH)
    finally:
        torch.set_default_dtype(default)
    assert {p.dtype for p in site.parameters()} == {torch.float32}


@every_kind
def test_a_meta_site_is_initialised_by_reset_parameters(config: Config) -> None:
    with torch.device("meta"):
        site: Any = config.build(WIDTH, sub_layer=3)
    for parameter in site.parameters():
        parameter.sequence_parallel = True
    torch.manual_seed(0)
    site.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(0)
    direct: Any = config.build(WIDTH, sub_layer=3)
    for parameter, expected in zip(site.parameters(), direct.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.sequence_parallel, "marks of a framework"


@every_kind
def test_width_is_the_call_and_runs_hooks(config: Config) -> None:
    site, (h, _) = random_site(config, WIDTH), random_streams(config, WIDTH, 3)
    calls: list[int] = []
    site.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(site.width(h), site(h))
    assert len(calls) == 2


@every_kind
def test_what_decays_has_two_dimensions(config: Config) -> None:
    shapes = config.parameter_shapes(WIDTH) | config.leave_shapes(WIDTH)
    assert {key for key, shape in shapes.items() if len(shape) > 1} <= {"dynamic_weight", "mapping_weight"}
    assert ManifoldConfig(leave="learned").leave_shapes(WIDTH)["leave_bias"] == (4,)


@every_kind
def test_a_hand_over_keeps_the_stream_once(config: Config) -> None:
    """For backward: h, o, beta, and parameters."""
    site = random_site(config, WIDTH)
    h, o = random_streams(config, WIDTH, 5)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        _, handover = site(h, hand_over=True)
        site.depth(o, h, handover)
    parameters = {p.data_ptr() for p in site.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    rest = sum(size for pointer, size in sizes.items() if pointer not in parameters)
    assert rest == h.nbytes + o.nbytes + handover.beta.nbytes


@every_kind
def test_bias_and_dropout_come_before_the_write(config: Config) -> None:
    """Once, not for every slot by itself."""
    site, (h, o) = random_site(config, WIDTH), random_streams(config, WIDTH, 50)
    bias = torch.randn(WIDTH, dtype=torch.float64)
    assert torch.equal(site.depth(o, h, bias=bias), site.depth(o + bias, h))
    torch.manual_seed(0)
    dropped = site.depth(o, h, bias=bias, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, site.depth(nn.functional.dropout(o + bias, 0.5), h))
    with pytest.raises(UserError, match=r"dropout=1.0: give a probability from 0 to below 1"):
        site.depth(o, h, dropout=1.0)


@pytest.mark.parametrize("config", KINDS[1:4], ids=name)
def test_wrong_shapes_are_refused(config: Config) -> None:
    site, wide = random_site(config, WIDTH), config.stream_width(WIDTH)
    h, o = random_streams(config, WIDTH, 3)
    cases = [
        (lambda: site(o), rf"h has shape \(3, 8\): its last dimension must be the width of the stream={wide}"),
        (lambda: site(h.t().contiguous().t()), r"h has strides \(1, 3\): its last dimension must be contiguous"),
        (lambda: site.depth(h, h), rf"o has shape \(3, {wide}\): its last dimension must be hidden_size=8"),
        (lambda: site.depth(o[:2], h), "they must be the same but for the last dimension"),
        (lambda: site.depth(o.float(), h), "o is torch.float32 and h torch.float64"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()


def test_a_width_that_fractions_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"^dhc_x4_m2: fractions=2 does not divide hidden_size=7: choose a number of"):
        HyperConfig(slots=4, fractions=2).build(7)
    with pytest.raises(UserError, match="fractions=4 does not divide hidden_size=6"):
        ManifoldConfig(slots=4, fractions=4).build_leave(6)
