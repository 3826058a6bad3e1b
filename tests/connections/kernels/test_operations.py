"""Forward and every gradient of the kernels, compiled and emulated, against float64 autograd of the reference.

Every test watches for races between lanes and for memory that nothing was written to. Few shapes and dtypes: what takes
time is to compile, once for all tests that agree in them. `test_interpreted.py` has the other options.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from laboratory.emulator.driver import Emulator
from megatron_fc import FracConfig, FracConnection, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections import ops
from megatron_fc.connections.kernels import launch
from megatron_fc.connections.norm import HandsOutWeights, NormWeights
from megatron_fc.connections.per_slot import PerSlotParameters
from megatron_fc.connections.site import PendingDepth
from support import kernel_cases, kernel_reference
from support.isolation import RMSNorm, reaches_its_own_token, stays_alone
from support.kernel_cases import FP32, HALF, check, check_given

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulator")]
# The norms are of fractions and of the sub-layer's input.
HALF_CASES = [
    (FracConfig(rate=4), "rmsnorm", torch.bfloat16),
    pytest.param(FracConfig(rate=4), "rmsnorm", torch.float16, marks=pytest.mark.soak),
    (FracConfig(rate=8, dynamic=False), "rmsnorm", torch.bfloat16),
    (FracConfig(rate=2, norm="layernorm"), "layernorm", torch.float16),
    (FracConfig(rate=4, norm="none", tanh=False, scale=False), None, torch.bfloat16),
]


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_token_counts(tokens: int) -> None:
    check(kernel_reference.make(FracConfig(rate=4), 64, tokens, torch.float32, "layernorm"), FP32)


def test_many_tokens() -> None:
    """More tiles than programs: sums go on from tile to tile."""
    check(kernel_reference.make(FracConfig(rate=4), 64, 127, torch.float32, "rmsnorm"), FP32)


@pytest.mark.parametrize(("config", "kind", "dtype"), HALF_CASES)
def test_half_precision(config: FracConfig, kind: str | None, dtype: torch.dtype) -> None:
    """Products of two 16-bit halves of the coefficients, on tensor cores."""
    check(kernel_reference.make(config, 64 * config.rate, 17, dtype, kind), HALF[dtype])


# Wider streams than a sub-layer, and slots of no power of two.
HYPER_CASES = [
    (HyperConfig(slots=4), 512, "rmsnorm", torch.bfloat16),
    (HyperConfig(slots=2), 100, "layernorm", torch.float16),
    (HyperConfig(slots=4, fractions=2, norm="layernorm"), 160, "layernorm", torch.bfloat16),
]


@pytest.mark.parametrize(("config", "width", "kind", "dtype"), HYPER_CASES)
def test_more_slots_than_fractions(config: HyperConfig, width: int, kind: str, dtype: torch.dtype) -> None:
    case = kernel_reference.make(config, width, 17, dtype, kind)
    check(case, HALF[dtype])
    reaches_its_own_token(case, math.nan if width == 512 else -math.inf, kernel_cases.passes(case))


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_eight_slots_of_one_fraction_in_fp32(tokens: int) -> None:
    check(kernel_reference.make(HyperConfig(slots=8), 64, tokens, torch.float32, "layernorm"), FP32)


GIVEN_CASES = [
    (HyperConfig(slots=4), 512, "rmsnorm", torch.bfloat16),
    (FracConfig(rate=4), 256, None, torch.float16),
]


@pytest.mark.parametrize(("config", "width", "kind", "dtype"), GIVEN_CASES)
def test_given_coefficients(config: FracConfig | HyperConfig, width: int, kind: str | None, dtype: torch.dtype) -> None:
    check_given(kernel_reference.make(config, width, 17, dtype, kind), HALF[dtype])


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_given_coefficients_in_fp32(tokens: int) -> None:
    check_given(kernel_reference.make(HyperConfig(slots=4), 100, tokens, torch.float32, "layernorm"), FP32)


def test_a_boundary_of_hyper_connections_is_its_parts() -> None:
    """With bias and dropout, as in `test_orders.py`."""
    case = kernel_reference.make(HyperConfig(slots=4), 512, 17, torch.bfloat16, "rmsnorm")
    found, expected = kernel_cases.boundary_and_parts(case, kernel_cases.depth_inputs(case, dropout=True))
    assert torch.equal(found["h'"], expected["h'"])
    for name, value in expected.items():
        assert kernel_reference.error(found[name], value.double()) < HALF[torch.bfloat16], name


@pytest.mark.parametrize(("mean", "tolerance"), [(1, FP32), (30, 2e-2), (3000, None)])
def test_rows_far_from_zero(mean: float, tolerance: float | None) -> None:
    """Variances come from sums of squares: digits are lost as the mean grows beyond the deviation, never all to NaN."""
    case = kernel_reference.make(FracConfig(rate=4, norm="layernorm"), 256, 5, torch.float32, "layernorm")
    case = replace(case, h=case.h + mean)
    (x, *_), _ = kernel_reference.width_and_gradients(case)
    found, _, _ = launch.width_forward(case.h, case.operands, case.norm)
    assert found is not None
    assert found.isfinite().all()
    assert tolerance is None or kernel_reference.error(found, x) < tolerance


def test_strides_of_streams_and_gradients_do_not_matter() -> None:
    """A site under autograd, as a user calls it."""
    site = FracConnection(256, FracConfig(rate=4, backend="triton"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.normal_(generator=generator)
    h, o = torch.randn(2, 7, 3, 256, generator=generator)
    weights = torch.randn(256, generator=generator)

    def gradients(lay_out: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        stream, output = (lay_out(t).requires_grad_() for t in (h, o))
        x, handover = site(stream, hand_over=True)
        out = site.depth(output, stream, handover)
        incoming = lay_out(weights.expand_as(h))
        return [x, out, *torch.autograd.grad([x, out], [stream, output, *site.parameters()], [incoming, incoming])]

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1).detach()

    assert not transposed(h).is_contiguous()
    pairs = zip(gradients(torch.Tensor.contiguous), gradients(transposed), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    pairs = zip(gradients(torch.Tensor.contiguous), gradients(torch.Tensor.detach), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), "a gradient that is one row, expanded"


@pytest.mark.parametrize("dynamic", [True, False])
def test_custom_ops_pass_opcheck(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its only element has no value. Nobody reads it but opcheck.
    monkeypatch.setattr(ops, "without_storage", lambda like: like.new_zeros(1).expand(like.shape))
    config = FracConfig(rate=4, dynamic=dynamic)
    p = FracConnection(64, config).operands()
    norm = NormWeights("layernorm", torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True), 1e-5)
    h, o, bias = torch.randn(5, 64), torch.randn(5, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    site = (*p, *ops.norm_values(norm))
    torch.library.opcheck(ops._width, (h.clone().requires_grad_(), *site, True))
    _, handover = ops.width(h, p, norm)
    beta, alpha, mixed = (t.detach() for t in handover.tensors)
    beta, mixed = beta.requires_grad_(), mixed.requires_grad_()
    depth = (o, h, beta, alpha, mixed, bias, torch.tensor([7]), 0.25)
    torch.library.opcheck(ops._depth, depth)
    torch.library.opcheck(ops._boundary, [t.detach() if isinstance(t, torch.Tensor) else t for t in (*depth, *site)])


def test_autocast_does_not_reach_inside() -> None:
    site = FracConnection(64, FracConfig(rate=4, backend="triton"))
    for parameter in site.parameters():
        torch.nn.init.normal_(parameter)
    h, o = torch.randn(7, 64, requires_grad=True), torch.randn(7, 64)

    def results(enabled: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = site.depth(o + site(h), h)
        return [y, *torch.autograd.grad(y.square().sum(), [h, *site.parameters()])]

    for expected, found in zip(results(False), results(True), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float32, 5e-7)])
def test_identity_at_the_initial_values(dtype: torch.dtype, tolerance: float) -> None:
    """x is h, and h' what Megatron's own sum gives: to the bit, but for the products of fp32, three of TF32 each."""
    case = kernel_reference.make(FracConfig(rate=4), 256, 17, dtype, None)
    x, beta, alpha = launch.width_forward(case.h, FracConnection(256, case.config).operands())
    assert x is not None
    torch.testing.assert_close(x, case.h, rtol=tolerance, atol=0)
    h = launch.depth_forward(launch.DepthInputs(case.o, case.h, beta, alpha))
    torch.testing.assert_close(h, case.o + case.h, rtol=tolerance, atol=2 * tolerance)  # a sum that may cancel


def test_absent_gradients_are_zero() -> None:
    case = kernel_reference.make(FracConfig(rate=4), 64, 5, torch.float32, "rmsnorm")
    zeros = torch.zeros_like(case.h)
    pairs = [
        ((case.g_x, None, None), (case.g_x, torch.zeros_like(case.g_beta), zeros)),
        ((None, case.g_beta, case.g_mixed), (zeros, case.g_beta, case.g_mixed)),
    ]
    for absent, given in pairs:
        one, other = (launch.width_backward(*g, case.h, case.operands, case.norm) for g in (absent, given))
        torch.testing.assert_close(one[0], other[0])


def test_fp32_stream_with_a_half_precision_output() -> None:
    case = kernel_reference.make(FracConfig(rate=4), 64, 5, torch.float32, None)
    o = case.o.bfloat16()
    depth = launch.DepthInputs(o, case.h, *case.coefficients)
    upcast = depth._replace(o=o.float())
    assert torch.equal(launch.depth_forward(depth), launch.depth_forward(upcast))
    assert launch.depth_backward(case.g_x, depth)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("config", [FracConfig(rate=4), HyperConfig(slots=4), HyperConfig(slots=4, fractions=2)])
def test_bias_and_dropout(config: FracConfig | HyperConfig) -> None:
    """What is dropped is zero in forward and backward alike, and in all slots; the rest is scaled; the seed decides."""
    case = kernel_reference.make(config, 256, 64, torch.float32, None)
    n, m = config.slots, config.fractions
    beta, alpha = torch.ones(64, n), torch.zeros(64, n * n)
    bias, seed = torch.randn(256), torch.tensor([7])
    depth = launch.DepthInputs(case.o, case.h, beta, alpha, bias, seed, 0.25)
    out, *others = launch.depth_forward(depth).unflatten(1, (n // m, 256)).unbind(1)
    assert all(torch.equal(out, other) for other in others)
    kept = out != 0
    assert 0.72 < kept.float().mean() < 0.78
    # Columns, fractions, tokens of a tile and of two know nothing of each other: 0.75^2 + 0.25^2 = 0.625 are alike.
    for tokens, columns in [(0, 1), (0, 2), (0, 3), (0, 4), (0, 64), (1, 0), (4, 0)]:
        alike = kept[tokens:, columns:] == kept[: 64 - tokens, : 256 - columns]
        assert 0.60 < alike.float().mean() < 0.65
    torch.testing.assert_close(out[kept], ((case.o + bias) / 0.75)[kept])
    g_o, g_beta, g_bias = launch.depth_backward(case.g_mixed, depth)
    assert torch.equal(g_o != 0, kept)
    torch.testing.assert_close(g_bias, g_o.sum(0))
    g = case.g_mixed.unflatten(1, (n // m, 256))
    torch.testing.assert_close(g_o[kept], (g.sum(1) / 0.75)[kept])
    torch.testing.assert_close(g_beta, (g * out.unsqueeze(1)).view(64, n, 256 // m).sum(-1))
    again = launch.depth_forward(depth._replace(seed=torch.tensor([8]))).unflatten(1, (n // m, 256))[:, 0]
    assert not torch.equal(again != 0, kept)


def test_transposed_mixing_would_be_noticed() -> None:
    """The cases tell source from destination: with gamma transposed the error is of order one."""
    case = kernel_reference.make(FracConfig(rate=4, dynamic=False), 64, 5, torch.float32, None)
    (x, _, _), _ = kernel_reference.width_and_gradients(case)
    swapped = case.operands._replace(static_gamma=case.p.static_gamma.view(4, 4).t().flatten())
    found, _, _ = launch.width_forward(case.h, swapped)
    assert found is not None
    assert kernel_reference.error(found, x) > 0.1


ISOLATED = [
    (FracConfig(rate=4), "rmsnorm", torch.bfloat16, math.nan),
    (FracConfig(rate=2, norm="layernorm"), "layernorm", torch.float16, -math.inf),
    (FracConfig(rate=8, dynamic=False), "rmsnorm", torch.bfloat16, math.inf),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("config", "kind", "dtype", "bad"), ISOLATED)
def test_a_token_that_is_not_finite_changes_no_other(
    config: FracConfig, kind: str | None, dtype: torch.dtype, bad: float, backend: str
) -> None:
    stays_alone(kernel_reference.make(config, 64 * config.rate, 17, dtype, kind), bad, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("parameter", PerSlotParameters._fields)
def test_a_parameter_of_16_bits_is_refused_by_name(parameter: str, backend: str) -> None:
    """However it got there: a cast of its data, FSDP2's parameters, a state dict that is assigned."""
    site, h = FracConnection(64, FracConfig(rate=4, backend=backend)), torch.randn(5, 64)
    handover = site(h, hand_over=True)[1]
    values = {name: p.detach().bfloat16() if name == parameter else p.detach() for name, p in site.named_parameters()}
    site.load_state_dict(values, assign=True)
    pending = PendingDepth(h, h, handover)
    for call in (lambda: site(h), lambda: site.depth(h, h), lambda: site(h.bfloat16()), lambda: site(pending)):
        with pytest.raises(UserError, match=f"{parameter} of a connection is torch.bfloat16, too coarse"):
            call()
    torch.testing.assert_close(site.float()(h), h)


class _ReturnsWeightsDtype(torch.nn.RMSNorm):
    """As Transformer Engine's norms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class OwnDtypeRMSNorm(HandsOutWeights, _ReturnsWeightsDtype): ...


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("stream", "weight", "cast"),
    [
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.float32, False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float32, False),
    ],
)
def test_the_input_has_the_dtype_that_its_norm_gives(
    stream: torch.dtype, weight: torch.dtype, cast: bool, backend: str
) -> None:
    """A residual stream in fp32 above all, with norms in bf16; of a boundary, too."""
    site = FracConnection(64, FracConfig(rate=4, backend=backend))
    for kind in (OwnDtypeRMSNorm, RMSNorm):
        norm = kind(64, eps=1e-5, dtype=weight)
        torch.nn.init.normal_(norm.weight)
        h = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            expected = norm(h)
            x, handover = site(h, norm, hand_over=True)
            found = [x]
            if backend == "triton":
                following, prepared = site(PendingDepth(torch.zeros_like(h), h, handover), norm)
                found.append(site(following, norm, prepared=prepared))
        for x in found:
            assert x.dtype == expected.dtype
            torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("what", ["width", "depth", "both"])
def test_a_second_derivative_is_refused(what: str, backend: str) -> None:
    """Also where the first gradient depends on saved tensors alone, as behind a sum."""
    site = FracConnection(64, FracConfig(rate=4, backend=backend))
    for parameter in site.parameters():
        torch.nn.init.normal_(parameter)
    h, o = (torch.randn(5, 64, requires_grad=True) for _ in range(2))
    if what == "width":
        loss = site(h).sum()
    elif what == "depth":
        loss = site.depth(o, h).sum()
    else:
        x, handover = site(h, hand_over=True)
        loss = site.depth(o + x, h, handover).square().sum()
    once = torch.autograd.grad(loss, h, retain_graph=True)
    [gradient] = torch.autograd.grad(loss, h, create_graph=True)
    assert torch.equal(gradient.detach(), once[0])
    with pytest.raises(UserError, match="a second derivative"):
        gradient.square().sum().backward()


def test_a_second_derivative_through_a_boundary_is_refused() -> None:
    site, after = (FracConnection(64, FracConfig(rate=4, backend="triton")) for _ in range(2))
    h, o = (torch.randn(5, 64, requires_grad=True) for _ in range(2))
    _, handover = site(h, hand_over=True)
    following, prepared = after(PendingDepth(o, h, handover))
    [gradient] = torch.autograd.grad(after(following, prepared=prepared).sum(), o, create_graph=True)
    with pytest.raises(UserError, match="a second derivative"):
        gradient.square().sum().backward()


def test_a_boundarys_values_are_not_taken_for_other_parameters() -> None:
    site = FracConnection(64, FracConfig(rate=4, backend="triton"))
    h, o = torch.randn(2, 5, 64)
    following, prepared = site(PendingDepth(o, h, site(h, hand_over=True)[1]))
    with torch.no_grad():
        site.static_gamma.mul_(2)
    assert torch.equal(site(following, prepared=prepared), site(following))
    site.static_gamma.data = 3 * site.static_gamma.data
    assert torch.equal(site(following, prepared=prepared), site(following))


# What torch does without a launch on a GPU: it makes tensors, or looks at them in another way.
_NO_LAUNCH = re.compile(r"aten::(new_)?empty\w*|aten::(expand|as_strided|detach|view|reshape|result_type)|(?!aten::).*")


def launches(emulator: Emulator, run: Callable[[], object]) -> Counter[str]:
    """What a GPU would be asked to do, by name: kernels, and operations of torch, also within custom ones."""
    before = len(emulator.launches)
    with torch.autograd.profiler.profile() as profile:
        run()
    kernels = [name for name, _ in emulator.launches[before:]]
    return Counter([*kernels, *(e.name for e in profile.function_events if not _NO_LAUNCH.fullmatch(e.name))])


@pytest.mark.parametrize("bias", [False, True])
def test_launches_of_sites(bias: bool, emulator: Emulator) -> None:
    """One for each pass forward. Backward two for a boundary and for a width connection, one for a depth connection
    and one more for its bias."""
    width = 64
    one, other = (FracConnection(width, FracConfig(rate=4, backend="triton")) for _ in range(2))

    def vector() -> torch.Tensor:
        return torch.ones(width, requires_grad=True)

    norms = [NormWeights("rmsnorm", vector(), None, 1e-5) for _ in range(2)]
    biases = [vector() if bias else None for _ in range(2)]
    h, o, after = (torch.randn(5, width, requires_grad=True) for _ in range(3))
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        x, handover = ops.width(h, one.operands(), norms[0])
        following, prepared = ops.boundary(o, h, handover, biases[0], None, 0.0, other.operands(), norms[1])
        later = ops.prepared_width(following, prepared, other.operands(), norms[1])
        assert later is not None
        outputs.extend((x, later[0], ops.depth(after, following, later[1], biases[1])))

    assert launches(emulator, forward) == {"width_forward_kernel": 2, "depth_forward_kernel": 1}
    weights = [norm.weight for norm in norms] + [b for b in biases if b is not None]
    wanted = [h, o, after, *weights, *one.parameters(), *other.parameters()]
    g = torch.randn(5, width)
    expected = {"width_backward_kernel": 2, "depth_backward_kernel": 1, "reduce_kernel": 2 + bias}
    assert launches(emulator, lambda: torch.autograd.grad(outputs, wanted, [g, g, g])) == expected


@pytest.mark.parametrize("config", [FracConfig(rate=4, backend="triton"), ManifoldConfig(backend="triton")])
def test_strides_of_parameters_do_not_matter(config: FracConfig | ManifoldConfig) -> None:
    """Somebody may have made them by transposing or slicing."""
    generator = torch.Generator().manual_seed(2)

    def drawn(size: torch.Size, strided: bool) -> torch.Tensor:
        values = torch.randn(*size, generator=generator)
        if not strided:
            return values
        every_other = values.new_empty(*size[:-1], 2 * size[-1])[..., ::2]
        return every_other.copy_(values) if values.dim() == 1 else values.t().contiguous().t()

    def results(strided: bool) -> list[torch.Tensor]:
        generator.manual_seed(2)
        site, norm = config.build(64), RMSNorm(64, eps=1e-5)
        for parameter in (*site.parameters(), norm.weight):
            parameter.data = drawn(parameter.shape, strided)
        h = torch.randn(5, site.stream_width, generator=generator).requires_grad_()
        bias = drawn(torch.Size([64]), strided).requires_grad_()
        x, handover = site(h, norm, hand_over=True)
        out = site.depth(x, h, handover, bias)
        return [x, out, *torch.autograd.grad(out.sum(), [h, bias, norm.weight, *site.parameters()])]

    for one, other in zip(results(False), results(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # torch's own products may round otherwise


def test_gradients_of_no_tokens_are_zero_and_there() -> None:
    site, norm, h = FracConnection(64, FracConfig(rate=4, backend="triton")), RMSNorm(64, eps=1e-5), torch.empty(0, 64)
    site(h.requires_grad_(), norm).sum().backward()
    for parameter in (norm.weight, site.dynamic_weight):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_what_kernels_cannot_do_is_refused() -> None:
    site, h = FracConnection(64, FracConfig(rate=4, backend="triton")), torch.randn(5, 64)
    with pytest.raises(UserError, match="no forward-mode derivative"):
        torch.func.jvp(site, (h,), (h,))
    with pytest.raises(UserError, match=r"the norm's weight has shape \(32,\)"):
        site(h, RMSNorm(32, eps=1e-5))
    with pytest.raises(UserError, match=r"static_beta of a connection is torch\.float64, and the kernels"):
        site.double()(h)
