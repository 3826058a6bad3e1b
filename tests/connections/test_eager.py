"""The torch backend against float64 autograd of the readable reference."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fc import FracConfig, FracConnection
from megatron_fc.connections import eager, reference
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters

RATES = (1, 2, 3, 4, 8)
CONFIGS = [
    *(FracConfig(rate=rate, dynamic=dynamic) for rate, dynamic in itertools.product(RATES, (True, False))),
    *(
        FracConfig(rate=rate, norm=norm, tanh=tanh, scale=scale)
        for rate, norm, tanh, scale in itertools.product(
            (2, 3), ("rmsnorm", "layernorm", "none"), (True, False), (True, False)
        )
        if (norm, tanh, scale) != ("rmsnorm", True, True)
    ),
]
# Relative to the largest value of a result. fp32: 2^-24 per operation, at most a few dozen of them in a chain, on
# coefficients of up to about ten (no norm, no tanh) whose sums cancel. fp64 likewise. A wrong index is of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5}


def name(config: FracConfig) -> str:
    switches = [config.norm, "tanh" if config.tanh else "linear", "scale" if config.scale else "unscaled"]
    return "-".join([config.label, *(switches if config.dynamic else [])])


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)
half_and_single = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random_parameters(config: FracConfig, c: int) -> PerSlotParameters:
    """Parameters without any symmetry, of order one, whose values fp32 holds: every precision sees the same ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = FracConnection(config.rate * c, config).site_parameters()
    # W as wide as a fraction would saturate tanh: keep the predictions of order one.
    size = PerSlotParameters(0.7, 0.7, 0.7, c**-0.5, 0.7, 0.7, 1.0)
    return PerSlotParameters._make(
        None if q is None else s * torch.randn(q.shape, generator=generator) for q, s in zip(shapes, size, strict=True)
    )


def random_streams(shape: tuple[int, int], dtype: torch.dtype, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def cast(p: PerSlotParameters, *to: Any) -> PerSlotParameters:
    return PerSlotParameters._make(None if q is None else q.to(*to) for q in p)


def by_autograd(
    o: Tensor, h: Tensor, g_x: Tensor | None, g_next: Tensor | None, p: PerSlotParameters, config: FracConfig
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
    o: Tensor, h: Tensor, g_x: Tensor | None, g_next: Tensor | None, p: PerSlotParameters, config: FracConfig
) -> dict[str, Tensor]:
    """The same by the four functions."""
    site = Operands.of(p, config)
    x, beta, alpha = eager.width_forward(h, site)
    assert x is not None
    results = {"x": x, "next": eager.depth_forward(o, h, beta, alpha)}
    g_o, g_beta = (torch.zeros_like(o), None) if g_next is None else eager.depth_backward(g_next, o, beta)
    g_h, g_p = eager.width_backward(g_x, g_beta, g_next, h, site)
    gradients = {"o": g_o, "h": g_h} | {key: g for key, g in g_p._asdict().items() if g is not None}
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
@pytest.mark.parametrize("c", [6, 48])
@every_config
def test_equals_the_reference(config: FracConfig, c: int, dtype: torch.dtype) -> None:
    check_on("cpu", config, c, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@every_config
def test_equals_the_reference_on_a_gpu(config: FracConfig, dtype: torch.dtype) -> None:
    check_on("cuda", config, 48, dtype)


def check_on(device: str, config: FracConfig, c: int, dtype: torch.dtype) -> None:
    p = random_parameters(config, c)
    streams = random_streams((17, config.rate * c), dtype)
    on_device = cast(p, device, torch.float64 if dtype == torch.float64 else torch.float32)
    actual = by_hand(*(s.to(device) for s in streams), on_device, config)
    assert_close(actual, by_autograd(*streams, p, config), TOLERANCE[dtype])
    for key in ("x", "next", "gradient of h", "gradient of o"):
        assert actual[key].dtype == dtype
    for key, q in on_device._asdict().items():
        assert q is None or actual[f"gradient of {key}"].dtype == q.dtype


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("config", CONFIGS[:8], ids=name)
def test_any_number_of_tokens(config: FracConfig, tokens: int) -> None:
    p, streams = random_parameters(config, 6), random_streams((tokens, config.rate * 6), torch.float32)
    assert_close(by_hand(*streams, p, config), by_autograd(*streams, p, config), TOLERANCE[torch.float32])


@pytest.mark.parametrize("missing", ["g_x", "g_next", "both"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_missing_gradients_are_zero(dynamic: bool, missing: str) -> None:
    config = FracConfig(rate=4, dynamic=dynamic)
    p, (o, h, g_x, g_next) = random_parameters(config, 6), random_streams((17, 24), torch.float32)
    given = {"g_x": (None, g_next), "g_next": (g_x, None), "both": (None, None)}[missing]
    actual = by_hand(o, h, *given, p, config)
    zeros = tuple(torch.zeros_like(o) if g is None else g for g in given)
    assert_close(actual, by_autograd(o, h, *zeros, p, config), TOLERANCE[torch.float32])


def test_a_sub_layers_output_of_lower_precision() -> None:
    config = FracConfig(rate=4)
    p, (o, h, g_x, g_next) = random_parameters(config, 48), random_streams((17, 192), torch.float32)
    actual = by_hand(o.bfloat16(), h, g_x, g_next, p, config)
    assert_close(actual, by_autograd(o.bfloat16(), h, g_x, g_next, p, config), TOLERANCE[torch.float32])
    assert (actual["next"].dtype, actual["gradient of o"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("matrix", ["static_gamma", "static_alpha"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_transposed_matrix_would_be_noticed(matrix: str, dynamic: bool) -> None:
    config = FracConfig(rate=4, dynamic=dynamic)
    p, streams = random_parameters(config, 6), random_streams((17, 24), torch.float32)
    transposed = p._replace(**{matrix: getattr(p, matrix).view(4, 4).t().flatten()})
    with pytest.raises(AssertionError, match="x:" if matrix == "static_gamma" else "next:"):
        assert_close(by_hand(*streams, p, config), by_autograd(*streams, transposed, config), 0.1)


def test_a_mean_far_from_zero_does_not_cancel() -> None:
    """layernorm of fractions whose mean is a hundred times their deviation."""
    config = FracConfig(rate=2, norm="layernorm")
    p, (o, h, g_x, g_next) = random_parameters(config, 48), random_streams((17, 96), torch.float32)
    h += 100
    # h itself carries 2^-24 of its mean: 1e-5 of the deviation, and the sums amplify it tenfold.
    assert_close(by_hand(o, h, g_x, g_next, p, config), by_autograd(o, h, g_x, g_next, p, config), 3e-4)


@half_and_single
@every_config
def test_starts_as_the_residual_network_bit_for_bit(config: FracConfig, dtype: torch.dtype) -> None:
    p = FracConnection(config.rate * 6, config).site_parameters()
    o, h, g_x, g_next = random_streams((17, config.rate * 6), dtype)
    actual = by_hand(o, h, g_x, g_next, p, config)
    assert torch.equal(actual["x"], h)
    assert torch.equal(actual["next"], o + h)
    assert torch.equal(actual["next"], reference.depth(o, h, p, config))
    assert torch.equal(actual["gradient of o"], g_next)
    assert torch.equal(actual["gradient of h"], g_x + g_next)


@half_and_single
def test_small_predictions_are_exact(dtype: torch.dtype) -> None:
    """Early in training the predictions are tiny: their gradients must not drown in the rounding of tanh."""
    config = FracConfig(rate=4)
    p, streams = random_parameters(config, 48), random_streams((17, 192), dtype)
    assert p.dynamic_weight is not None
    p = p._replace(dynamic_weight=1e-3 * p.dynamic_weight)
    # A prediction of 1e-3 within 1e-7: only the scales' gradients are made of it.
    assert_close(by_hand(*streams, p, config), by_autograd(*streams, p, config), 3e-4)


def test_autocast_lowers_nothing() -> None:
    config = FracConfig(rate=4)
    p, streams = random_parameters(config, 48), random_streams((17, 192), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = by_hand(*streams, p, config)
    torch.testing.assert_close(inside, by_hand(*streams, p, config), rtol=0, atol=0)


def test_rows_apart_in_memory() -> None:
    config = FracConfig(rate=4)
    p, streams = random_parameters(config, 6), random_streams((17, 24), torch.float32)
    apart = [torch.cat((s, s), 1)[:, :24] for s in streams]
    torch.testing.assert_close(by_hand(*apart, p, config), by_hand(*streams, p, config), rtol=0, atol=0)


def test_leaves_its_arguments_alone_and_builds_no_graph() -> None:
    config = FracConfig(rate=4)
    p, streams = random_parameters(config, 6), random_streams((17, 24), torch.float32)
    arguments = [t.requires_grad_() for t in (*streams, *p) if t is not None]
    before = [t.detach().clone() for t in arguments]
    assert not any(t.requires_grad for t in by_hand(*streams, p, config).values())
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("tokens", [1, 2])
@every_config
def test_no_result_shares_memory(config: FracConfig, tokens: int) -> None:
    """Custom operators may not return their inputs, nor one tensor twice."""
    p, (o, h, g_x, g_next) = random_parameters(config, 6), random_streams((tokens, config.rate * 6), torch.float32)
    site = Operands.of(p, config)
    x, beta, alpha = eager.width_forward(h, site)
    g_o, g_beta = eager.depth_backward(g_next, o, beta)
    g_h, g_p = eager.width_backward(g_x, g_beta, g_next, h, site)
    results = [x, beta, alpha, eager.depth_forward(o, h, beta, alpha), g_o, g_beta, g_h, *g_p]
    tensors = [t for t in (o, h, g_x, g_next, *p, *results) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_coefficients_without_the_mix() -> None:
    config = FracConfig(rate=3)
    p, (h, *_) = random_parameters(config, 6), random_streams((17, 18), torch.float32)
    x, beta, alpha = eager.width_forward(h, Operands.of(p, config), want_x=False)
    assert x is None
    f = reference.slots(h, 3)
    torch.testing.assert_close(beta, reference.beta(f, p, config))
    torch.testing.assert_close(alpha, reference.alpha(f, p, config).flatten(1))
    assert beta.is_contiguous()
    assert alpha.is_contiguous()


def test_what_is_kept_between_calls_is_real() -> None:
    config = FracConfig(rate=4)
    p, streams = random_parameters(config, 6), random_streams((23, 24), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        by_hand(*(torch.empty(23, 24) for _ in streams), p, config)
    assert_close(by_hand(*streams, p, config), by_autograd(*streams, p, config), TOLERANCE[torch.float32])
