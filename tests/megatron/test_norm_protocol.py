"""How a layer learns that its norm slot returns (x, h): 0.19 sees the tuple, 0.20 asks the norm when it is built."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import torch_norm, transformer_layer
from packaging.version import Version

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron import versions
from megatron_fc.megatron.slots import NormSlot, Pairing
from megatron_fc.megatron.specs import connect
from support import tiny

DFC, DHC, MHC = FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4)


class Declaring:
    returns_residual: bool


@pytest.fixture
def newer_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers unpack what a norm returns where it says so, as those of Megatron 0.20, and take it as it is elsewhere."""
    apply_module = transformer_layer.apply_module

    def as_newer(module: Any) -> Callable[..., Any]:
        declares, call = getattr(module, "returns_residual", False), apply_module(module)

        def applied(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if declares:
                x, h = output
                return x, h
            # What is no tuple is not unpacked by 0.19 either.
            return list(output) if isinstance(module, NormSlot) and isinstance(output, tuple) else output

        return applied

    monkeypatch.setattr(transformer_layer, "apply_module", as_newer)
    monkeypatch.setattr(torch_norm, "LayerNormInterface", Declaring)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tiny.randomise_connections(model)
    loss = tiny.loss(model, tiny.tokens())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("kind", "connection"),
    [*((kind, DFC) for kind in tiny.KINDS), ("mtp", DHC), ("hybrid", MHC), ("mixed", MHC)],
    ids=lambda value: getattr(value, "label", value),
)
@pytest.mark.parametrize("build", [tiny.build, tiny.build_without_hand_over])
def test_the_newer_one_gives_the_same_gradients(
    kind: str,
    connection: ConnectionConfig,
    build: Callable[..., torch.nn.Module],
    request: pytest.FixtureRequest,
) -> None:
    expected = gradients(build(kind, connection))
    request.getfixturevalue("newer_protocol")
    found = gradients(build(kind, connection))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("newer_protocol")
@pytest.mark.parametrize("observed", ["", "norm", "connection"])
@pytest.mark.parametrize("connection", [DFC, DHC, MHC], ids=["dfc", "dhc", "mhc"])
def test_hooks_registered_behind_the_build_change_nothing(connection: ConnectionConfig, observed: str) -> None:
    """A layer of the newer protocol does not ask again."""
    model = tiny.build("mixed", connection)
    expected = gradients(tiny.build("mixed", connection))
    for module in model.modules():
        if isinstance(module, NormSlot):
            module.get_submodule(observed).register_forward_hook(lambda *_: None)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("returns_stream", "options", "declared"),
    [
        (True, {}, True),
        (False, {}, False),  # Mamba layers
        (True, {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, False),
    ],
)
def test_declared_is_what_is_returned(returns_stream: bool, options: dict[str, Any], declared: bool) -> None:
    config = tiny.transformer_config("dense", **options)
    norm = torch_norm.WrappedTorchNorm
    slot = NormSlot(
        config, tiny.WIDTH, 1e-5, norm=norm, connection=DFC, pairing=Pairing("norm", returns_stream=returns_stream)
    )
    slot.paired = True
    assert slot.returns_residual is declared
    assert isinstance(slot(torch.randn(3, 2, tiny.WIDTH)), tuple) is declared


@pytest.mark.parametrize(
    ("version", "interface", "known"),
    [("0.19.9", object, True), ("0.21.0", Declaring, True), ("0.21.0", object, False), ("1.0", None, False)],
)
def test_a_newer_megatron_of_unknown_protocol_is_refused_when_a_layer_is_built(
    version: str, interface: type | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "megatron_version", lambda: Version(version))
    monkeypatch.setattr(torch_norm, "LayerNormInterface", interface)
    versions.check_norm_protocol.cache_clear()
    spec = connect(get_gpt_layer_local_spec(normalization="RMSNorm"), DFC)
    try:
        if known:
            spec(config=tiny.transformer_config("dense"))
        else:
            with pytest.raises(UserError, match=f"megatron-core {version} takes a norm's residual in a way"):
                spec(config=tiny.transformer_config("dense"))
    finally:
        versions.check_norm_protocol.cache_clear()
