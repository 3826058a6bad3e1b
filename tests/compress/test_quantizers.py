"""What ModelOpt does to the tiny models, and that connections and norms are not among it."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    import rank
    from support import tiny
import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.checkpoints.modelopt_state import enabled_quantizers, refuse_quantized_connections, restore_state
from megatron_fc.compress.recipes import quantization_config
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.errors import UserError
from megatron_fc.megatron.slots import NormSlot

pytestmark = pytest.mark.modelopt

BF16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16}
LAYERNORM = {"normalization": "LayerNorm"}
DFC, DHC, LEARNED = FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")
MODELS: list[tuple[str, dict[str, Any], ConnectionConfig]] = [
    ("moe", {}, DFC),
    ("mixed", LAYERNORM, DFC),
    ("hybrid", {}, DFC),
    ("mla", {}, DFC),
    ("shared", BF16, DFC),
    ("mixed", LAYERNORM, DHC),
    ("hybrid", {}, LEARNED),
]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with rank.one_rank():
        yield


def build(kind: str, options: dict[str, Any], connection: ConnectionConfig = DFC, seed: int = 1) -> torch.nn.Module:
    model = tiny.build(kind, connection, seed=seed, **options)
    tiny.randomise_connections(model)
    return model


def quantize(model: torch.nn.Module, config: dict[str, Any]) -> None:
    import modelopt.torch.quantization as mtq

    mtq.quantize(unwrap_model(model), config, lambda _: [tiny.loss(model, tiny.tokens(seed)) for seed in range(2)])


@pytest.mark.parametrize(("kind", "options", "connection"), MODELS)
@pytest.mark.parametrize("recipe", ["fp8", "int8", "int4_awq"])
def test_quantized_model_trains_every_parameter(
    kind: str, options: dict[str, Any], connection: ConnectionConfig, recipe: str
) -> None:
    model = build(kind, options, connection)
    original = tiny.loss(model, tiny.tokens(9)).item()
    quantize(model, quantization_config(recipe))
    refuse_quantized_connections(model)
    assert not any("norm" in name for name in enabled_quantizers(model))
    assert len(enabled_quantizers(model)) > 10
    loss = tiny.loss(model, tiny.tokens(9, batch=16))
    assert loss.item() == pytest.approx(original, rel=0.1)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad.any() for name, p in model.named_parameters() if is_connection_key(name))


@pytest.mark.parametrize("recipe", ["fp8", "int8", "int4_awq"])
def test_quantizers_change_what_the_model_computes(recipe: str) -> None:
    model = build("moe", {})
    before = tiny.logits(model, tiny.tokens(9))
    quantize(model, quantization_config(recipe))
    assert (tiny.logits(model, tiny.tokens(9)) - before).abs().max() > 1e-4


def test_scales_are_the_maxima_of_the_calibration_data() -> None:
    model = build("moe", {})
    projection = unwrap_model(model).decoder.layers[0].self_attention.linear_proj
    seen: list[torch.Tensor] = []
    watch = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().abs().max()))
    for seed in range(2):
        tiny.loss(model, tiny.tokens(seed))
    watch.remove()
    quantize(model, quantization_config("fp8"))
    assert seen[0] != seen[1]
    assert projection.input_quantizer.amax.item() == max(seen).item()
    assert projection.weight_quantizer.amax.item() == projection.weight.abs().max().item()


def test_virtual_stages_are_refused(tmp_path: Path) -> None:
    chunks = [torch.nn.Identity(), torch.nn.Identity()]
    with pytest.raises(UserError, match="leave num_layers_per_virtual_pipeline_stage"):
        restore_state(chunks, tmp_path)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_hugging_face_export_is_refused_before_it_drops_a_connection(kind: str, tmp_path: Path) -> None:
    """ModelOpt's exporter takes a norm slot's weight, which it has not; the plain model is the control."""
    from modelopt.torch.export import export_mcore_gpt_to_hf

    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tiny.VOCABULARY}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    plain, connected = tmp_path / "plain", tmp_path / "connected"
    export_mcore_gpt_to_hf(tiny.build("dense", None), str(tmp_path), export_dir=str(plain))
    assert list(plain.glob("*.safetensors"))
    with pytest.raises(KeyError, match="weight"):
        export_mcore_gpt_to_hf(build(kind, {}), str(tmp_path), export_dir=str(connected))
    assert not connected.exists()


@pytest.mark.parametrize(("kind", "options", "connection"), MODELS)
def test_restored_model_has_the_same_logits(
    kind: str, options: dict[str, Any], connection: ConnectionConfig, tmp_path: Path
) -> None:
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state

    model = build(kind, options, connection)
    quantize(model, quantization_config("fp8"))
    inner = unwrap_model(model)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    dist_checkpointing.save({"model": inner.sharded_state_dict()}, str(checkpoint))
    save_sharded_modelopt_state([inner], str(checkpoint), ("torch_dist", 1))

    again = build(kind, options, connection, seed=2)
    bare = unwrap_model(again)
    restore_state([bare], checkpoint)
    assert enabled_quantizers(bare) == enabled_quantizers(inner)
    bare.load_state_dict(dist_checkpointing.load({"model": bare.sharded_state_dict()}, str(checkpoint))["model"])
    assert torch.equal(tiny.logits(again, tiny.tokens(3)), tiny.logits(model, tiny.tokens(3)))


def test_quantizer_in_a_slot_is_refused() -> None:
    from modelopt.torch.quantization.nn import TensorQuantizer

    model = build("moe", {}, LEARNED)
    leave = unwrap_model(model).decoder.final_layernorm.connection
    leave.weight_quantizer = TensorQuantizer()
    with pytest.raises(UserError, match=r"final_layernorm.connection.weight_quantizer quantises a connection"):
        refuse_quantized_connections(model)

    model = build("moe", {})
    quantize(model, quantization_config("fp8"))
    slot = next(module for module in model.modules() if isinstance(module, NormSlot))
    slot.norm.input_quantizer = TensorQuantizer()
    with pytest.raises(UserError, match=r"input_layernorm.norm.input_quantizer quantises a connection"):
        refuse_quantized_connections(model)
