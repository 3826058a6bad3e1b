"""The torch backend against float64 autograd of the readable reference."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections import eager, reference
from megatron_fc.connections.eager import AnyOperands
from megatron_fc.connections.on_manifold import ManifoldParameters
from megatron_fc.connections.operands import ManifoldOperands, Operands
from megatron_fc.connections.per_slot import PerSlotParameters
from megatron_fc.connections.reference import Config, Parameters
from support import family
from support.family import FRAC, MEMBERS, name

# Relative to the largest value of a result. fp32: 2^-24 per operation, at most a few dozen of them in a chain, on
# coefficients of up to about ten (no norm, no tanh) whose sums cancel. fp64 likewise. A wrong index is of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5}
BETWEEN = HyperConfig(slots=6, fractions=3)
EACH_KIND: list[Config] = [FracConfig(rate=4), HyperConfig(slots=4), BETWEEN, ManifoldConfig(slots=4)]

every_member = pytest.mark.parametrize("config", MEMBERS, ids=name)
each_kind = pytest.mark.parametrize("config", EACH_KIND, ids=name)
half_and_single = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random_parameters(config: Config, c: int) -> Parameters:
    """With slots of width c."""
    values = iter(family.random_parameters(config, config.fractions * c))
    if isinstance(config, ManifoldConfig):
        return ManifoldParameters(*values)
    shapes = config.parameter_shapes(config.fractions * c)
    return PerSlotParameters(**{key: next(values) if key in shapes else None for key in PerSlotParameters._fields})


def operands(p: Parameters, config: Config) -> AnyOperands:
    if isinstance(p, ManifoldParameters):
        assert isinstance(config, ManifoldConfig)
        return ManifoldOperands.of(p, config)
    assert not isinstance(config, ManifoldConfig)
    return Operands.of(p, config)


def random_streams(config: Config, tokens: int, c: int, dtype: torch.dtype) -> list[Tensor]:
    """o, h, and the gradients that come in for x and for the next stream."""
    generator = torch.Generator().manual_seed(1)
    widths = (config.fractions * c, config.slots * c) * 2
    return [torch.randn(tokens, width, generator=generator).to(dtype) for width in widths]


def cast[P: Parameters](p: P, *to: Any) -> P:
    return p._make(None if q is None else q.to(*to) for q in p)


def by_autograd(
    o: Tensor, h: Tensor, g_x: Tensor | None, g_next: Tensor | None, p: Parameters, config: Config
) -> dict[str, Tensor]:
    """Everything that a site computes, in float64 by the reference and autograd."""
    p = cast(p, torch.float64)
    leaves = {"o": o.double().requires_grad_(), "h": h.double().requires_grad_()}
    leaves |= {key: q.requires_grad_() for key, q in p._asdict().items() if q is not None}
    results = {
        "x": reference.width(leaves["h"], p, config),
        "next": reference.depth(leaves["o"], leaves["h"], p, config),
    }
    pairs = [(r, g.double()) for r, g in zip(results.values(), (g_x, g_next), strict=True) if g is not None]
    gradients = torch.autograd.grad(
        [r for r, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return results | {f"gradient of {key}": g for key, g in zip(leaves, gradients, strict=True)}


def by_hand(
    o: Tensor, h: Tensor, g_x: Tensor | None, g_next: Tensor | None, p: Parameters, config: Config
) -> dict[str, Tensor]:
    """The same by the four functions."""
    site = operands(p, config)
    x, beta, alpha = eager.width_forward(h, site)
    assert x is not None
    results = {"x": x, "next": eager.depth_forward(o, h, beta, alpha)}
    g_o, g_beta = (torch.zeros_like(o), None) if g_next is None else eager.depth_backward(g_next, o, beta)
    g_h, g_p = eager.width_backward(g_x, g_beta, g_next, h, site)
    gradients = {"o": g_o, "h": g_h} | {key: g for key, g in zip(p._fields, g_p, strict=True) if g is not None}
    return results | {f"gradient of {key}": g for key, g in gradients.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert value.shape == expected[key].shape, key
        # A result in bf16 is rounded once, by half a unit in its last place.
        rounding = torch.finfo(value.dtype).eps / 2 if value.dtype == torch.bfloat16 else 0.0
        scale = expected[key].abs().amax().item() if value.numel() else 0.0
        torch.testing.assert_close(
            value.cpu().double(),
            expected[key],
            rtol=rounding,
            atol=tolerance * scale,
            msg=lambda m, key=key: f"{key}: {m}",
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@every_member
def test_equals_the_reference(config: Config, dtype: torch.dtype) -> None:
    check_on("cpu", config, 6, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("config", [*FRAC, *EACH_KIND], ids=name)
def test_equals_the_reference_with_wide_slots(config: Config, dtype: torch.dtype) -> None:
    check_on("cpu", config, 48, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@every_member
def test_equals_the_reference_on_a_gpu(config: Config, dtype: torch.dtype) -> None:
    check_on("cuda", config, 48, dtype)


def check_on(device: str, config: Config, c: int, dtype: torch.dtype) -> None:
    p = random_parameters(config, c)
    streams = random_streams(config, 17, c, dtype)
    on_device = cast(p, device, torch.float64 if dtype == torch.float64 else torch.float32)
    actual = by_hand(*(s.to(device) for s in streams), on_device, config)
    assert_close(actual, by_autograd(*streams, p, config), TOLERANCE[dtype])
    for key in ("x", "next", "gradient of h", "gradient of o"):
        assert actual[key].dtype == dtype
    for key, q in on_device._asdict().items():
        assert q is None or actual[f"gradient of {key}"].dtype == q.dtype


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("config", [*FRAC[:8], *EACH_KIND], ids=name)
def test_any_number_of_tokens(config: Config, tokens: int) -> None:
    p, streams = random_parameters(config, 6), random_streams(config, tokens, 6, torch.float32)
    assert_close(by_hand(*streams, p, config), by_autograd(*streams, p, config), TOLERANCE[torch.float32])


@pytest.mark.parametrize("missing", ["g_x", "g_next", "both"])
@pytest.mark.parametrize("config", [FracConfig(rate=4, dynamic=False), *EACH_KIND], ids=name)
def test_missing_gradients_are_zero(config: Config, missing: str) -> None:
    p, (o, h, g_x, g_next) = random_parameters(config, 6), random_streams(config, 17, 6, torch.float32)
    given = {"g_x": (None, g_next), "g_next": (g_x, None), "both": (None, None)}[missing]
    actual = by_hand(o, h, *given, p, config)
    zeros = tuple(torch.zeros_like(r) if g is None else g for r, g in zip((o, h), given, strict=True))
    assert_close(actual, by_autograd(o, h, *zeros, p, config), TOLERANCE[torch.float32])


@each_kind
def test_a_sub_layers_output_of_lower_precision(config: Config) -> None:
    p, (o, h, g_x, g_next) = random_parameters(config, 48), random_streams(config, 17, 48, torch.float32)
    actual = by_hand(o.bfloat16(), h, g_x, g_next, p, config)
    assert_close(actual, by_autograd(o.bfloat16(), h, g_x, g_next, p, config), TOLERANCE[torch.float32])
    assert (actual["next"].dtype, actual["gradient of o"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("matrix", ["static_gamma", "static_alpha"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_transposed_matrix_would_be_noticed(matrix: str, dynamic: bool) -> None:
    config = FracConfig(rate=4, dynamic=dynamic)
    p, streams = random_parameters(config, 6), random_streams(config, 17, 6, torch.float32)
    assert isinstance(p, PerSlotParameters)
    transposed = p._replace(**{matrix: getattr(p, matrix).view(4, 4).t().flatten()})
    with pytest.raises(AssertionError, match="x:" if matrix == "static_gamma" else "next:"):
        assert_close(by_hand(*streams, p, config), by_autograd(*streams, transposed, config), 0.1)


@pytest.mark.parametrize("fault", ["blocks", "off by one"])
def test_a_wrong_write_would_be_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every result that depends on it, backward included."""
    p, (o, h, g_x, g_next) = random_parameters(BETWEEN, 6), random_streams(BETWEEN, 17, 6, torch.float32)
    right = by_autograd(o, h, g_x, g_next, p, BETWEEN)
    order = [0, 0, 1, 1, 2, 2] if fault == "blocks" else [1, 2, 0, 1, 2, 0]
    monkeypatch.setattr(reference, "enter", lambda o, _: o.unflatten(-1, (3, 6))[..., order, :].flatten(-2))
    wrong = by_autograd(o, h, g_x, g_next, p, BETWEEN)
    actual = by_hand(o, h, g_x, g_next, p, BETWEEN)
    for key in ("next", "gradient of o", "gradient of static_beta"):
        assert_close({key: actual[key]}, {key: right[key]}, TOLERANCE[torch.float32])
        with pytest.raises(AssertionError, match=key):
            assert_close({key: actual[key]}, {key: wrong[key]}, 0.1)


def test_a_mean_far_from_zero_does_not_cancel() -> None:
    """layernorm of fractions whose mean is a hundred times their deviation."""
    config = FracConfig(rate=2, norm="layernorm")
    p, (o, h, g_x, g_next) = random_parameters(config, 48), random_streams(config, 17, 48, torch.float32)
    h += 100
    # h itself carries 2^-24 of its mean: 1e-5 of the deviation, and the sums amplify it tenfold.
    assert_close(by_hand(o, h, g_x, g_next, p, config), by_autograd(o, h, g_x, g_next, p, config), 3e-4)


@half_and_single
@pytest.mark.parametrize("config", FRAC, ids=name)
def test_starts_as_the_residual_network_bit_for_bit(config: FracConfig, dtype: torch.dtype) -> None:
    site: Any = config.build(config.rate * 6)
    p = site.site_parameters()
    o, h, g_x, g_next = random_streams(config, 17, 6, dtype)
    actual = by_hand(o, h, g_x, g_next, p, config)
    assert torch.equal(actual["x"], h)
    assert torch.equal(actual["next"], o + h)
    assert torch.equal(actual["next"], reference.depth(o, h, p, config))
    assert torch.equal(actual["gradient of o"], g_next)
    assert torch.equal(actual["gradient of h"], g_x + g_next)


@half_and_single
@pytest.mark.parametrize("config", EACH_KIND[:3], ids=name)
def test_small_predictions_are_exact(config: Config, dtype: torch.dtype) -> None:
    """Early in training the predictions are tiny: their gradients must not drown in the rounding of tanh."""
    p, streams = random_parameters(config, 48), random_streams(config, 17, 48, dtype)
    assert isinstance(p, PerSlotParameters)
    assert p.dynamic_weight is not None
    p = p._replace(dynamic_weight=1e-3 * p.dynamic_weight)
    # A prediction of 1e-3 within 1e-7: only the scales' gradients are made of it.
    assert_close(by_hand(*streams, p, config), by_autograd(*streams, p, config), 3e-4)


@each_kind
def test_autocast_lowers_nothing(config: Config) -> None:
    p, streams = random_parameters(config, 48), random_streams(config, 17, 48, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = by_hand(*streams, p, config)
    torch.testing.assert_close(inside, by_hand(*streams, p, config), rtol=0, atol=0)


@each_kind
def test_rows_apart_in_memory(config: Config) -> None:
    p, streams = random_parameters(config, 6), random_streams(config, 17, 6, torch.float32)
    apart = [torch.cat((s, s), 1)[:, : s.shape[1]] for s in streams]
    torch.testing.assert_close(by_hand(*apart, p, config), by_hand(*streams, p, config), rtol=0, atol=0)


@each_kind
def test_leaves_its_arguments_alone_and_builds_no_graph(config: Config) -> None:
    p, streams = random_parameters(config, 6), random_streams(config, 17, 6, torch.float32)
    arguments = [t.requires_grad_() for t in (*streams, *p) if t is not None]
    before = [t.detach().clone() for t in arguments]
    assert not any(t.requires_grad for t in by_hand(*streams, p, config).values())
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("tokens", [1, 2])
@every_member
def test_no_result_shares_memory(config: Config, tokens: int) -> None:
    """Custom operators may not return their inputs, nor one tensor twice."""
    p, (o, h, g_x, g_next) = random_parameters(config, 6), random_streams(config, tokens, 6, torch.float32)
    site = operands(p, config)
    x, beta, alpha = eager.width_forward(h, site)
    g_o, g_beta = eager.depth_backward(g_next, o, beta)
    g_h, g_p = eager.width_backward(g_x, g_beta, g_next, h, site)
    results = [x, beta, alpha, eager.depth_forward(o, h, beta, alpha), g_o, g_beta, g_h, *g_p]
    tensors = [t for t in (o, h, g_x, g_next, *p, *results) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@each_kind
def test_coefficients_without_the_mix(config: Config) -> None:
    p, (_, h, *_) = random_parameters(config, 6), random_streams(config, 17, 6, torch.float32)
    x, beta, alpha = eager.width_forward(h, operands(p, config), want_x=False)
    assert x is None
    s = reference.slots(h, config.slots)
    torch.testing.assert_close(beta, reference.beta(s, p, config))
    torch.testing.assert_close(alpha, reference.alpha(s, p, config).flatten(1))
    assert beta.is_contiguous()
    assert alpha.is_contiguous()


@each_kind
def test_what_is_kept_between_calls_is_real(config: Config) -> None:
    p, streams = random_parameters(config, 6), random_streams(config, 23, 6, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        by_hand(*(torch.empty(s.shape) for s in streams), p, config)
    assert_close(by_hand(*streams, p, config), by_autograd(*streams, p, config), TOLERANCE[torch.float32])
