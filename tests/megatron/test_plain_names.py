"""`load_state_dict` of connected models: plain names are taken, nothing is dropped, whatever `strict` says."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.ends import LearnedLeave
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.connections.site import Site
from megatron_fc.megatron.slots import NormSlot, Pairing
from support import tiny

DFC, SFC = FracConfig(rate=4), FracConfig(rate=4, dynamic=False)
DHC, LEARNED = HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")
LAYERNORM = {"normalization": "LayerNorm"}  # its norms have biases, too


def trained(kind: str, frac: ConnectionConfig | None, **options: object) -> torch.nn.Module:
    """A model whose norms are not at their initial values."""
    model = tiny.build(kind, frac, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("frac", [DFC, SFC, DHC, LEARNED], ids=["dfc", "sfc", "dhc", "mhc"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_plain_state_dict(kind: str, frac: ConnectionConfig) -> None:
    plain, model = trained(kind, None), tiny.build(kind, frac, seed=3)
    for module in model.modules():
        if isinstance(module, (Site, LearnedLeave)):
            module.start_as_residual()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(is_connection_key(key) for key in missing)
    # mHC is the residual network up to the epsilons of its coefficients.
    rounding = 1e-4 if frac == LEARNED else 0
    expected = tiny.logits(plain, tiny.tokens())
    torch.testing.assert_close(tiny.logits(model, tiny.tokens()), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("connection", [LEARNED, ManifoldConfig(slots=4, fractions=4)], ids=["mhc", "mfc"])
def test_plain_weights_in_a_model_that_does_not_start_as_the_plain_one(connection: ConnectionConfig) -> None:
    model, plain = tiny.build("mixed", connection), trained("mixed", None).state_dict()
    own, identical = tiny.build("mixed", connection).state_dict(), tiny.build("mixed", DFC)
    with pytest.warns(UserWarning, match=f"into a model whose {connection.label} connections are no identities"):
        model.load_state_dict(plain, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(own)
        model.load_state_dict({key: value for key, value in plain.items() if key.startswith("embedding")}, strict=False)
        identical.load_state_dict(plain, strict=False)


def test_strict_misses_the_connections_and_nothing_else() -> None:
    plain, model = trained("mixed", None).state_dict(), tiny.build("mixed", DFC)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(plain)
    assert "Unexpected" not in str(error.value)
    assert ".norm." not in str(error.value)
    connections = {key: value for key, value in model.state_dict().items() if is_connection_key(key)}
    model.load_state_dict({**plain, **connections}, strict=True)


def test_a_part_of_a_model() -> None:
    plain, model = trained("dense", None), tiny.build("dense", DFC)
    for name in ("decoder", "decoder.layers.1", "decoder.layers.0.input_layernorm"):
        source, target = plain.get_submodule(name), model.get_submodule(name)
        assert not target.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    for layer in (0, 1):
        source, target = plain.decoder.layers[layer].input_layernorm, model.decoder.layers[layer].input_layernorm
        assert torch.equal(target.norm.weight, source.weight)


def test_norms_that_transformer_engine_keeps_in_projections() -> None:
    """Its names, of which only the layer sees both, in a model of local layers."""
    plain, layer = trained("dense", None), tiny.build("dense", DFC).decoder.layers[1]
    source = plain.decoder.layers[1].state_dict()
    fused = {}
    for key, value in source.items():
        key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        fused[key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = value
    assert len(fused.keys() & source.keys()) == len(source) - 2
    assert not layer.load_state_dict(fused, strict=False).unexpected_keys
    assert torch.equal(layer.input_layernorm.norm.weight, source["input_layernorm.weight"])
    assert torch.equal(layer.pre_mlp_layernorm.norm.weight, source["pre_mlp_layernorm.weight"])


@pytest.mark.parametrize("strict", [True, False])
def test_the_dynamic_part_is_not_dropped(strict: bool) -> None:
    static, dynamic = tiny.build("mixed", SFC), trained("mixed", DFC).state_dict()
    with pytest.raises(RuntimeError) as error:
        static.load_state_dict(dynamic, strict=strict)
    site = "decoder.layers.1.pre_mlp_layernorm.connection.dynamic_weight"
    assert f"{site} and what else would be dropped (4 here): this model has sfc_x4" in str(error.value)


def test_another_number_of_fractions_fails_as_torch_says_it() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for .*static_beta"):
        tiny.build("dense", DFC).load_state_dict(trained("dense", FracConfig(rate=2)).state_dict(), strict=False)


def test_the_static_part_alone_leaves_the_dynamic_one_at_its_start() -> None:
    static, model = trained("dense", SFC), tiny.build("dense", DFC)
    missing, unexpected = model.load_state_dict(static.state_dict(), strict=False)
    assert not unexpected
    assert all(is_connection_key(key) for key in missing)
    found, expected = tiny.logits(model, tiny.tokens()), tiny.logits(static, tiny.tokens())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_slot_without_a_norm_of_its_own_drops_none() -> None:
    """Transformer Engine's projections apply it there (input_norm=projection)."""
    config = tiny.transformer_config("dense", **LAYERNORM)
    slots = [
        NormSlot(config, tiny.WIDTH, 1e-5, norm=norm, connection=DFC, pairing=Pairing("norm"))
        for norm in (WrappedTorchNorm, lambda **_: torch.nn.Identity())
    ]
    state = slots[0].state_dict()
    assert {"norm.weight", "norm.bias"} < state.keys()
    with pytest.raises(RuntimeError, match=r"norm\.bias and what else would be dropped \(2 here\)"):
        slots[1].load_state_dict(state, strict=False)


class Layer(torch.nn.Module):
    """As much of a layer as loading sees, without the process groups that keep Megatron's from being copied."""

    def __init__(self) -> None:
        super().__init__()
        self.submodules_config = SimpleNamespace(sharded_state_dict_keys_map={"slot.norm.": "elsewhere.norm_"})
        config = tiny.transformer_config("dense")
        self.slot = NormSlot(config, tiny.WIDTH, 1e-5, norm=WrappedTorchNorm, connection=DFC, pairing=Pairing("slot"))


@pytest.mark.parametrize("name", ["slot.weight", "elsewhere.norm_weight", "slot.norm.weight"])
def test_a_copied_layer_loads_into_itself(name: str) -> None:
    original = Layer()
    layer, weight = copy.deepcopy(original), torch.randn(tiny.WIDTH)
    assert not layer.load_state_dict({name: weight}, strict=False).unexpected_keys
    assert torch.equal(layer.slot.norm.weight, weight)
    assert not torch.equal(original.slot.norm.weight, weight)


def test_a_module_without_a_map_of_keys_is_left_alone() -> None:
    owner = torch.nn.Module()
    owner.slot = Layer().slot
    assert not owner._load_state_dict_pre_hooks
