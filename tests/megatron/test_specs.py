"""connect on every kind of spec: identity at the start, counts, weight decay, refusals."""

import copy
import itertools
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELayerNormColumnParallelLinear
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_fc import FracConfig, FracConnection, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.backend import choose_backend
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.megatron.input_norm import _READERS, _submodules
from megatron_fc.megatron.parameter_count import count_parameters
from megatron_fc.megatron.slots import AddSlot, NormSlot
from megatron_fc.megatron.specs import block_spec, connect
from support import tiny

DFC, SFC = FracConfig(rate=4), FracConfig(rate=4, dynamic=False)
DHC, MHC, MFC = HyperConfig(slots=4), ManifoldConfig(slots=4), ManifoldConfig(slots=4, fractions=4)
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
# Megatron's local MoE and shared experts take no bias.
WITH_BIAS = [kind for kind in tiny.KINDS if kind in ("dense", "mtp", "mla")]


@pytest.mark.parametrize("frac", [DFC, SFC], ids=["dfc", "sfc"])
@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "bias"), [*((k, False) for k in tiny.KINDS), *((k, True) for k in WITH_BIAS)])
def test_logits_at_initialisation_equal_the_residual_models_bit_for_bit(
    kind: str, bias: bool, dropout: float, precision: dict[str, Any], frac: FracConfig
) -> None:
    options = {**precision, "add_bias_linear": bias, "hidden_dropout": dropout}
    plain = tiny.logits(tiny.build(kind, None, **options), tiny.tokens())
    model = tiny.build(kind, frac, **options)
    assert torch.equal(tiny.logits(model, tiny.tokens()), plain)
    tiny.randomise_connections(model)
    assert not torch.allclose(tiny.logits(model, tiny.tokens()), plain, atol=1e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_sub_layer_asks_for_its_backend_once(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The width connection does, and the depth connection takes its answer over."""
    asked = []

    def ask(config: FracConfig, stream: torch.Tensor) -> str:
        asked.append(config)
        return choose_backend(config, stream)

    monkeypatch.setattr("megatron_fc.connections.site.choose_backend", ask)
    model = tiny.build("dense", FracConfig(rate=4, recompute=recompute))
    tiny.loss(model, tiny.tokens()).backward()
    assert len(asked) == sum(isinstance(module, FracConnection) for module in model.modules())


def test_dropout_is_applied() -> None:
    model = tiny.build("dense", DFC, hidden_dropout=0.5)
    first, again, other = (tiny.logits(model, tiny.tokens(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_gradient_reaches_every_parameter() -> None:
    for kind in tiny.KINDS:
        model = tiny.build(kind, DFC)
        tiny.randomise_connections(model)
        tiny.loss(model, tiny.tokens(batch=8)).backward()
        without = [
            n for n, p in model.named_parameters() if is_connection_key(n) and (p.grad is None or not p.grad.any())
        ]
        assert not without, (kind, without)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_one_site_per_sub_layer(kind: str) -> None:
    model = tiny.build(kind, DFC)
    sites = [module for module in model.modules() if isinstance(module, FracConnection)]
    assert len(sites) == {"mtp": 6}.get(kind, 4)
    assert len({id(p) for site in sites for p in site.parameters()}) == 7 * len(sites)
    added = count_parameters([model]).total - count_parameters([tiny.build(kind, None)]).total
    assert added == count_parameters([model]).connections == len(sites) * DFC.parameter_count(tiny.WIDTH)


@pytest.mark.parametrize(("frac", "added"), [(DFC, 165_056), (SFC, 1_152)], ids=["dfc_x4", "sfc_x4"])
def test_parameters_added_to_the_papers_7b_model(frac: FracConfig, added: int) -> None:
    """OLMoE-7B's 16 layers and width 2048, all 32 sites built by Megatron, on the meta device."""
    with torch.device("meta"):
        model = tiny.build("moe", frac, num_layers=16, hidden_size=2048, num_attention_heads=16)
    sites = [module for module in model.modules() if isinstance(module, FracConnection)]
    assert len(sites) == 32
    assert sum(p.numel() for n, p in model.named_parameters() if is_connection_key(n)) == added


WEIGHT_DECAY = {
    "static_beta": 0.0,
    "static_gamma": 0.0,
    "static_alpha": 0.0,
    "scale_beta": 0.0,
    "scale_alpha": 0.0,
    "norm_weight": 0.0,
    "dynamic_weight": 1.0,
    "mapping_weight": 1.0,
    "mapping_bias": 0.0,
    "mapping_scale": 0.0,
    "leave_weight": 1.0,
    "leave_bias": 0.0,
    "leave_scale": 0.0,
}


@pytest.mark.parametrize(
    "connection",
    [DFC, DHC, HyperConfig(slots=4, fractions=2, dynamic_beta=False), ManifoldConfig(slots=4, leave="learned"), MFC],
    ids=lambda connection: connection.label,
)
def test_weight_decay_groups_of_megatrons_optimizer(connection: ConnectionConfig) -> None:
    model = tiny.build("moe", connection)
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1), [chunk])
    names = {id(p): name for name, p in model.named_parameters()}
    decayed: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if is_connection_key(name):
                decayed.setdefault(name.rpartition(".")[2], set()).add(group["wd_mult"])
    assert decayed == {name: {WEIGHT_DECAY[name]} for name in connection.last_dimensions(tiny.WIDTH)}


def _snapshot(value: Any) -> Any:
    """The structure of a spec as plain values, to compare before and after."""
    if isinstance(value, ModuleSpec):
        return (value.module, dict(value.params), _snapshot(value.submodules))
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), {key: _snapshot(item) for key, item in vars(value).items()})
    if isinstance(value, list):
        return [_snapshot(item) for item in value]
    return copy.copy(value) if isinstance(value, dict) else id(value)


def _block() -> TransformerBlockSubmodules:
    config = tiny.transformer_config("mixed", num_layers=3, moe_layer_freq=[0, 1, 1])
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")


@pytest.mark.parametrize("spec", [_block, get_gpt_layer_local_spec, lambda: hybrid_stack_spec])
def test_input_spec_is_left_untouched(spec: Any) -> None:
    spec = spec()
    before = _snapshot(spec)
    connect(spec, DFC)
    assert _snapshot(spec) == before


def test_homogeneous_layers_keep_sharing_one_spec() -> None:
    connected = connect(_block(), DFC)
    assert connected.layer_specs[1] is connected.layer_specs[2]
    assert connected.layer_specs[0] is not connected.layer_specs[1]


def _reader(layer: Any, norm_slot: str) -> tuple[Any, str]:
    """What holds the projection that reads a sub-layer's input, and its name there."""
    name, projections = _READERS[norm_slot]
    inner = _submodules(getattr(layer, name))
    return inner, next((p for p in projections if getattr(inner, p, None)), "")


@pytest.mark.parametrize("input_norm", ["width", "projection"])
def test_transformer_engine_stack_is_connected_in_every_layer(input_norm: str) -> None:
    """Structure only, TE itself needs a GPU; `tests/te` builds these layers with it."""
    submodules = connect(hybrid_stack_spec, FracConfig(rate=4, input_norm=input_norm)).submodules
    slots = {
        "mamba_layer": ("norm", "mamba_bda", True),
        "gdn_layer": ("input_layernorm", "self_attn_bda", True),
        "attention_layer": ("input_layernorm", "self_attn_bda", True),
        "dsa_layer": ("input_layernorm", "self_attn_bda", False),
        "mla_layer": ("input_layernorm", "self_attn_bda", False),
        "mlp_layer": ("pre_mlp_layernorm", "mlp_bda", True),
        "moe_layer": ("pre_mlp_layernorm", "mlp_bda", False),
    }
    for layer, (norm, add, fused) in slots.items():
        plain, connected = (getattr(s, layer).submodules for s in (hybrid_stack_spec.submodules, submodules))
        assert getattr(connected, norm).module is NormSlot, layer
        assert getattr(connected, add).module is AddSlot, layer
        builder, keys = getattr(connected, norm).params["norm"], connected.sharded_state_dict_keys_map
        (before, name), (after, _) = _reader(plain, norm), _reader(connected, norm)
        assert fused == (getattr(before, name, None) is TELayerNormColumnParallelLinear), layer
        if fused and input_norm == "width":
            assert builder is not IdentityOp, layer
            assert getattr(after, name) is TEColumnParallelLinear, layer
            assert keys[f"{norm}.norm."] == f"{_READERS[norm][0]}.{name}.layer_norm_", layer
        else:
            assert builder is getattr(plain, norm), layer
            assert fused == (builder is IdentityOp), layer
            assert getattr(after, name, None) is getattr(before, name, None), layer
            assert keys[f"{norm}.norm."] == f"{norm}.", layer
    attention = hybrid_stack_spec.submodules.attention_layer.submodules
    assert attention.self_attention.submodules.linear_qkv is TELayerNormColumnParallelLinear, "the input was changed"


@pytest.mark.parametrize("input_norm", ["width", "projection"])
def test_gpt_layer_of_transformer_engine_is_connected(input_norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt import gpt_layer_specs

    # Megatron hides its provider where TE is not installed; its layer classes are there all the same.
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider)
    for moe, mla, down in itertools.product((None, 4), (False, True), (False, True)):
        plain = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=moe, moe_grouped_gemm=bool(moe), multi_latent_attention=mla, mla_down_proj_fusion=down
        )
        connected = connect(plain, FracConfig(rate=4, input_norm=input_norm)).submodules
        apart = input_norm == "width"
        for slot, fused in (("input_layernorm", not mla or down), ("pre_mlp_layernorm", moe is None)):
            norm = getattr(connected, slot).params["norm"]
            assert (norm is getattr(plain.submodules, slot)) == (not (fused and apart))
            inner, name = _reader(connected, slot)
            reads = getattr(inner, name, None)
            assert (reads is TELayerNormColumnParallelLinear) == (fused and not apart)
        assert connected.self_attn_bda.module is connected.mlp_bda.module is AddSlot
        keys = connected.sharded_state_dict_keys_map
        attention = "input_layernorm." if mla or not apart else "self_attention.linear_qkv.layer_norm_"
        assert keys["input_layernorm.norm."] == attention
        assert keys["pre_mlp_layernorm.norm."] == (
            "mlp.linear_fc1.layer_norm_" if moe is None and apart else "pre_mlp_layernorm."
        )


def test_checkpoint_names_of_the_norms_are_the_plain_models() -> None:
    for kind in tiny.KINDS:
        plain, model = (tiny.build(kind, frac).sharded_state_dict() for frac in (None, DFC))
        plain_keys, keys = ({value.key for value in state.values()} for state in (plain, model))
        added = keys - plain_keys
        assert plain_keys <= keys, kind
        assert added, kind
        assert all(".connection." in key for key in added), kind


def test_a_pipeline_stage_without_layers_is_no_error() -> None:
    assert connect(TransformerBlockSubmodules(layer_specs=[]), DFC).layer_specs == []


class OtherLayer(TransformerLayer):
    pass


def _layer(**submodules: Any) -> ModuleSpec:
    return ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(**submodules))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (_layer(), "TransformerLayer has no residual connection to replace"),
        (TransformerBlockSubmodules(layer_specs=[_layer()]), "has no residual connection to replace"),
        (connect(get_gpt_layer_local_spec(), DFC), "TransformerLayer is connected already"),
        (connect(hybrid_stack_spec, DFC), "MambaLayer is connected already"),
        (
            ModuleSpec(OtherLayer, submodules=TransformerLayerSubmodules()),
            "OtherLayer is no layer, block or stack",
        ),
        (
            _layer(self_attn_bda=torch.nn.Identity),
            "self_attn_bda of TransformerLayer is Identity, not Megatron's",
        ),
        (_layer(cross_attn_bda=get_bias_dropout_add), "has cross-attention"),
        ("dfc_x4", "str is no layer, block or stack"),
    ],
)
def test_refused_specs(spec: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        connect(spec, SFC)


@pytest.mark.parametrize("config", ["dfc_x4", 4, {"rate": 4}, get_gpt_layer_local_spec()])
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match=r"connect takes a spec and a FracConfig, HyperConfig or ManifoldConfig, not "):
        connect(get_gpt_layer_local_spec(), config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fused_residual_rmsnorm": True}, "fused_residual_rmsnorm takes the residual"),
        ({"inference_fuse_tp_communication": True}, "inference_fuse_tp_communication adds the residual"),
        ({"mla_down_proj_fusion": True, "is_hybrid_model": True}, "mla_down_proj_fusion overwrites the norm slot"),
        (
            {"fine_grained_activation_offloading": True, "offload_modules": ["attn_norm"]},
            "offload_modules=\\['attn_norm'\\] frees the residual",
        ),
        (
            {"cuda_graph_impl": "local", "recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "accumulates the width connection's gradients by itself",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "overlap_p2p_comm=False with virtual stages on two pipeline ranks",
        ),
        ({"hidden_size": 66, "num_attention_heads": 2}, "rate=4 does not divide hidden_size=66"),
    ],
)
def test_options_that_would_be_silently_wrong_are_refused(options: dict[str, Any], sentence: str) -> None:
    config = tiny.transformer_config("dense")
    for name, value in options.items():  # set afterwards: Megatron itself accepts some of them on GPUs only
        setattr(config, name, value)
    spec = connect(get_gpt_layer_local_spec(normalization="RMSNorm"), DFC)
    with pytest.raises(UserError, match=sentence):
        spec.submodules.input_layernorm(config=config, hidden_size=config.hidden_size, eps=1e-5)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_layers_captured_one_by_one_have_no_room_for_a_wider_stream(impl: str) -> None:
    config = tiny.transformer_config("dense")
    for connection in (DHC, MHC):
        block = connect(block_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), config), connection)
        norm = block.layer_specs[0].submodules.input_layernorm
        for allowed in ("none", "full_iteration"):
            config.cuda_graph_impl = allowed
            norm(config=config, hidden_size=64, eps=1e-5)
        config.cuda_graph_impl = impl
        sentence = f"cuda_graph_impl={impl} captures layers whose input is hidden_size=64 wide, and the stream of"
        with pytest.raises(UserError, match=f"^{sentence} {connection.label} has 256 values per token: use full_it"):
            norm(config=config, hidden_size=64, eps=1e-5)


def test_a_slot_replaced_after_connect_is_noticed() -> None:
    config = tiny.transformer_config("dense")
    spec = connect(get_gpt_layer_local_spec(normalization="RMSNorm"), DFC)
    spec.submodules.input_layernorm = IdentityOp
    with pytest.raises(UserError, match="width connection of 'input_layernorm' was replaced after connect"):
        spec(config=config)

    spec = connect(get_gpt_layer_local_spec(normalization="RMSNorm"), DFC)
    spec.submodules.mlp_bda = get_bias_dropout_add
    layer = spec(config=config)
    with pytest.raises(UserError, match="depth connection of this layer was replaced"):
        layer(torch.randn(4, 1, tiny.WIDTH), attention_mask=None)


def test_deep_copied_spec_builds() -> None:
    config = tiny.transformer_config("dense")
    spec = copy.deepcopy(connect(get_gpt_layer_local_spec(normalization="RMSNorm"), DFC))
    layer = spec(config=config)
    h = torch.randn(4, 1, tiny.WIDTH)
    assert layer(h, attention_mask=None)[0].shape == h.shape
