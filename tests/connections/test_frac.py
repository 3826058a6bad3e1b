import pytest
import torch

from megatron_fc import FracConfig, FracConnection, UserError

RATES = (1, 2, 4, 8)


@pytest.mark.parametrize("rate", RATES)
def test_parameters_of_a_dynamic_site(rate: int) -> None:
    c = 64 // rate
    site = FracConnection(64, FracConfig(rate=rate))
    shapes = {name: tuple(parameter.shape) for name, parameter in site.named_parameters()}
    assert shapes == {
        "static_beta": (rate,),
        "static_gamma": (rate * rate,),
        "static_alpha": (rate * rate,),
        "dynamic_weight": (2 * rate + 1, c),
        "scale_beta": (1,),
        "scale_alpha": (1,),
        "norm_weight": (c,),
    }
    assert sum(p.numel() for p in site.parameters()) == site.config.parameter_count(64)


@pytest.mark.parametrize(
    ("config", "absent"),
    [
        (FracConfig(dynamic=False), {"dynamic_weight", "scale_beta", "scale_alpha", "norm_weight"}),
        (FracConfig(norm="none"), {"norm_weight"}),
        (FracConfig(scale=False), {"scale_beta", "scale_alpha"}),
        (FracConfig(norm="layernorm"), set()),
    ],
)
def test_absent_parameters(config: FracConfig, absent: set[str]) -> None:
    site = FracConnection(64, config)
    every = {name for name, _ in FracConnection(64, FracConfig()).named_parameters()}
    assert every - {name for name, _ in site.named_parameters()} == absent
    assert sum(p.numel() for p in site.parameters()) == config.parameter_count(64)


def test_initial_values() -> None:
    site = FracConnection(16, FracConfig(rate=4, initial_scale=0.25))
    assert torch.equal(site.static_beta, torch.ones(4))
    assert torch.equal(site.static_gamma.view(4, 4), torch.eye(4))
    assert torch.equal(site.static_alpha.view(4, 4), torch.eye(4))
    assert not site.dynamic_weight.any()
    assert site.scale_beta.item() == site.scale_alpha.item() == 0.25
    assert torch.equal(site.norm_weight, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_identity_at_initialisation(dtype: torch.dtype, rate: int, dynamic: bool) -> None:
    site = FracConnection(64, FracConfig(rate=rate, dynamic=dynamic))
    h, o = torch.randn(2, 33, 64).to(dtype)
    assert torch.equal(site(h), h)
    assert torch.equal(site.depth(o, h), h + o)


def test_fp32_stream_with_half_precision_output() -> None:
    site = FracConnection(64, FracConfig())
    h, o = torch.randn(3, 64), torch.randn(3, 64).bfloat16()
    result = site.depth(o, h)
    assert result.dtype == torch.float32
    assert torch.equal(result, h + o.float())


def test_width_is_the_call_and_runs_hooks() -> None:
    site = FracConnection(8, FracConfig(rate=2))
    calls: list[int] = []
    site.register_forward_pre_hook(lambda *_: calls.append(1))
    h = torch.randn(3, 8)
    assert torch.equal(site.width(h), site(h))
    assert len(calls) == 2


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_parameters_stay_fp32_through_a_cast(cast) -> None:
    site = FracConnection(8, FracConfig(rate=2))
    with torch.no_grad():
        site.static_alpha[0] = 1.001  # bf16 has no such number
    model = cast(torch.nn.Sequential(torch.nn.Linear(8, 8), site))
    assert model[0].weight.dtype != torch.float32
    assert {p.dtype for p in site.parameters()} == {torch.float32}
    assert site.static_alpha[0].item() == pytest.approx(1.001, abs=1e-7)


def test_fp32_even_under_a_half_precision_default() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        site = FracConnection(8, FracConfig(rate=2))
    finally:
        torch.set_default_dtype(default)
    assert {p.dtype for p in site.parameters()} == {torch.float32}


def test_double_and_back_and_device_moves() -> None:
    site = FracConnection(8, FracConfig(rate=2))
    assert site.double().static_beta.dtype == torch.float64
    assert site.float().static_beta.dtype == torch.float32
    assert site.to("meta", torch.bfloat16).static_beta.device.type == "meta"
    assert site.static_beta.dtype == torch.float32


def test_meta_site_is_initialised_by_reset_parameters() -> None:
    with torch.device("meta"):
        site = FracConnection(8, FracConfig(rate=2))
    site.to_empty(device="cpu").reset_parameters()
    h = torch.randn(3, 8)
    assert torch.equal(site(h), h)


def test_marks_of_a_framework_survive_leaving_the_meta_device() -> None:
    with torch.device("meta"):
        site = FracConnection(8, FracConfig(rate=2))
    for parameter in site.parameters():
        parameter.sequence_parallel = True
    site.to_empty(device="cpu", recurse=False).reset_parameters()  # as Megatron-FSDP does
    assert all(parameter.sequence_parallel for parameter in site.parameters())


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_is_exact_and_runs_under_autocast(dynamic: bool, dtype: torch.dtype) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        site = FracConnection(64, FracConfig(rate=4, dynamic=dynamic, recompute=recompute))
        for parameter in site.parameters():
            torch.nn.init.normal_(parameter)
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        h = torch.randn(5, 64).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            x = site(h, norm=torch.nn.LayerNorm(64))
            result = site.depth(layer(x), h)
        (result.float() ** 2).sum().backward()
        return [result, h.grad, *(p.grad for p in (*site.parameters(), *layer.parameters()))]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_wrong_shapes_are_refused() -> None:
    site = FracConnection(64, FracConfig())
    with pytest.raises(UserError, match=r"h has shape \(2, 32\): its last dimension must be hidden_size=64"):
        site(torch.randn(2, 32))
    with pytest.raises(UserError, match=r"o has shape \(1, 64\) and h \(2, 64\)"):
        site.depth(torch.randn(1, 64), torch.randn(2, 64))
    with pytest.raises(UserError, match="rate=3 does not divide hidden_size=64"):
        FracConnection(64, FracConfig(rate=3))
