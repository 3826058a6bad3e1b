"""Every kind of model of Transformer Engine's layers: built, its checkpoint exchangeable with the plain model's."""

from pathlib import Path
from typing import Any

import pytest
import torch

te = pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed: see `make test-te`")

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.extensions.transformer_engine import (  # noqa: E402
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
)

from megatron_fc import FracConfig, FracConnection  # noqa: E402
from megatron_fc.connections.kinds import is_connection_key  # noqa: E402
from support import tiny  # noqa: E402

NORMS = ("width", "projection")
FUSED_MLA = {"mla_down_proj_fusion": True}
MODELS = [*((kind, {}) for kind in tiny.KINDS), ("mla", FUSED_MLA)]
NAMES = [*tiny.KINDS, "mla with one down-projection"]


def build(kind: str, frac: FracConfig | None, **options: Any) -> torch.nn.Module:
    if kind in ("moe", "shared", "mixed", "hybrid"):
        options["moe_grouped_gemm"] = True
    return tiny.build(kind, frac, te=True, transformer_impl="transformer_engine", **options)


def keys(model: torch.nn.Module) -> set[str]:
    return {value.key for value in model.sharded_state_dict().values() if hasattr(value, "key")}


def modules(model: torch.nn.Module, kind: type) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("input_norm", NORMS)
@pytest.mark.parametrize(("kind", "options"), MODELS, ids=NAMES)
def test_checkpoint_keys_are_the_plain_models_and_the_connections(
    kind: str, options: dict[str, Any], input_norm: str
) -> None:
    plain, model = build(kind, None, **options), build(kind, FracConfig(rate=4, input_norm=input_norm), **options)
    added = keys(model) - keys(plain)
    assert keys(plain) <= keys(model)
    assert added
    assert all(".connection." in key for key in added), added
    fused = modules(plain, TELayerNormColumnParallelLinear)
    assert len(modules(model, TELayerNormColumnParallelLinear)) == (0 if input_norm == "width" else len(fused))
    if kind != "mla" or options:
        assert fused


def shared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the plain model has too, by its name in checkpoints."""
    sharded = model.sharded_state_dict()
    return {v.key: v.data for v in sharded.values() if hasattr(v, "data") and ".connection." not in v.key}


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
@pytest.mark.parametrize("written_by", ["width", "projection"])
def test_checkpoints_are_exchangeable_between_both_places_of_the_norm(
    kind: str, written_by: str, tmp_path: Path
) -> None:
    read_by = next(norm for norm in NORMS if norm != written_by)
    source, target = (build(kind, FracConfig(rate=4, input_norm=norm)) for norm in (written_by, read_by))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter))
    dist_checkpointing.save(source.sharded_state_dict(), str(tmp_path))
    target.load_state_dict(dist_checkpointing.load(target.sharded_state_dict(), str(tmp_path)))
    found, expected = shared(target), shared(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected if isinstance(expected[key], torch.Tensor))
    # And the plain model takes its share of it.
    plain = build(kind, None)
    plain.load_state_dict(dist_checkpointing.load(plain.sharded_state_dict(), str(tmp_path)))
    assert all(torch.equal(value, expected[key]) for key, value in shared(plain).items() if torch.is_tensor(value))


@pytest.mark.parametrize("input_norm", NORMS)
@pytest.mark.parametrize("kind", ["dense", "mixed", "hybrid"])
def test_a_plain_models_state_dict_is_taken(kind: str, input_norm: str) -> None:
    plain, model = build(kind, None), build(kind, FracConfig(rate=4, input_norm=input_norm))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(is_connection_key(key) for key in missing)
    found, expected = shared(model), shared(plain)
    assert all(torch.equal(found[key], value) for key, value in expected.items() if torch.is_tensor(value))


def test_the_same_seed_gives_the_same_weights_wherever_the_norm_is() -> None:
    width, projection, plain = (
        shared(build("mixed", frac)) for frac in (*(FracConfig(rate=4, input_norm=norm) for norm in NORMS), None)
    )
    for key, value in plain.items():
        if torch.is_tensor(value):
            assert torch.equal(value, width[key]), key
            assert torch.equal(value, projection[key]), key


def test_the_width_connection_knows_te_norms_by_their_weights() -> None:
    from megatron_fc.connections.norm import norm_weights

    layer = build("dense", FracConfig(rate=4)).decoder.layers[0]
    for slot in (layer.input_layernorm, layer.pre_mlp_layernorm):
        weights = norm_weights(slot.norm, torch.empty(1, tiny.WIDTH))
        assert weights is not None
        assert weights.kind == "rmsnorm"
        assert weights.weight is slot.norm.weight
    assert type(layer.self_attention.linear_qkv) is TEColumnParallelLinear


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_in_a_model_in_fp8_the_connections_stay_plain_fp32(recipe: str) -> None:
    options = {"fp8": "hybrid", "fp8_recipe": recipe, "bf16": True, "params_dtype": torch.bfloat16}
    model = build("moe", FracConfig(rate=4), **options)
    frac = [p for name, p in model.named_parameters() if is_connection_key(name)]
    assert frac
    assert {(type(p), p.dtype) for p in frac} == {(torch.nn.Parameter, torch.float32)}


def test_quantised_model_initialisation_does_not_reach_a_connection() -> None:
    """What `fp8_param` builds layers under; TE's own weights would need its kernels there, and so a GPU."""
    from transformer_engine.pytorch import fp8_model_init
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    with fp8_model_init(enabled=True):
        assert FP8GlobalStateManager.with_fp8_parameters(), "the context is not on: nothing was tested"
        site = FracConnection(64, FracConfig(rate=4))
    assert {(type(p), p.dtype) for p in site.parameters()} == {(torch.nn.Parameter, torch.float32)}
    assert not any(isinstance(module, te.pytorch.module.base.TransformerEngineBaseModule) for module in site.modules())
