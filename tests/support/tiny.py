"""Tiny real Megatron models on one rank: the same few lines for every test that needs one."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.megatron.hybrid import hybrid_pattern, hybrid_stack
from megatron_fc.megatron.norm_options import MEGATRON_NORMS, NormOptions
from megatron_fc.megatron.slots import Pairing
from megatron_fc.megatron.specs import block_spec, connect
from megatron_fc.megatron.specs.norms import place_norms
from support.torch_attention import TorchAttention

VOCABULARY, SEQUENCE, WIDTH = 128, 16, 64
KINDS = ("dense", "moe", "shared", "mixed", "mla", "mtp", "hybrid")


def transformer_config(kind: str, **options: Any) -> TransformerConfig:
    """A config of 2 layers; `mixed` has a dense layer before a MoE layer, `hybrid` is its sub-layers in a row."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "use_cpu_initialization": True,
        "attention_backend": AttnBackend.unfused,
    }
    cls = TransformerConfig
    if kind in ("moe", "shared", "mixed", "hybrid"):
        values |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
        values |= {"moe_aux_loss_coeff": 0.01, "moe_ffn_hidden_size": 64}
    if kind == "shared":
        values["moe_shared_expert_intermediate_size"] = 64
    if kind in ("mixed", "hybrid"):
        values["moe_layer_freq"] = [0, 1]
    if kind == "hybrid":
        values |= {"num_layers": 4, "is_hybrid_model": True}
    if kind == "mtp":
        values["mtp_num_layers"] = 1
    if kind == "mla":
        cls = MLATransformerConfig
        values |= {"multi_latent_attention": True, "q_lora_rank": 32, "kv_lora_rank": 16, "rope_type": "rope"}
        values |= {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}
    return cls(**(values | options))


def build(
    kind: str,
    frac: ConnectionConfig | None,
    seed: int = 1,
    vp_stage: int | None = None,
    tied: bool = False,
    te: bool = False,
    exchanges_shapes: bool = False,
    norms: NormOptions = MEGATRON_NORMS,
    **options: Any,
) -> torch.nn.Module:
    """Build this rank's part of the model, with plain residuals where `frac` is None, of TE's layers with `te`.

    The seed fixes every weight that both kinds of model have; tied embeddings are the output layer's weights too.
    """
    config = transformer_config(kind, **options)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    destroy_moe_metrics_tracker()  # it is global and sized for the number of layers that it saw first
    stages, stage = config.virtual_pipeline_model_parallel_size, vp_stage
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": SEQUENCE,
        "share_embeddings_and_output_weights": tied,
        "position_embedding_type": "rope",
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=True) and stage in (None, 0),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and (stages is None or stage == stages - 1),
        "vp_stage": vp_stage,
    }
    model: torch.nn.Module
    if kind == "hybrid":
        stack = place_norms(hybrid_stack(use_te=te, qk_layernorm=config.qk_layernorm), norms)
        stack = stack if frac is None else connect(stack, frac, exchanges_shapes=exchanges_shapes)
        pattern = hybrid_pattern(config.num_layers // 2, config.moe_layer_freq)
        if stages:  # the pattern has to say where they begin
            size = len(pattern) // (stages * config.pipeline_model_parallel_size)
            pattern = "|".join(pattern[at : at + size] for at in range(0, len(pattern), size))
        model = HybridModel(config, stack, hybrid_layer_pattern=pattern, **common)
    else:
        model = _build_gpt(config, frac, te, exchanges_shapes, norms, common)
    _randomise_biases(model, seed)
    return Float16Module(config, model) if config.bf16 or config.fp16 else model


def build_without_hand_over(kind: str, frac: ConnectionConfig | None, **options: Any) -> torch.nn.Module:
    """Build a model whose norm slots return x alone, so that every depth connection looks at h by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_fc.megatron.specs.connected.Pairing", _silent_pairing)
        return build(kind, frac, **options)


def _silent_pairing(slot: str, place: tuple[int, int], before: Pairing | None, returns_stream: bool) -> Pairing:
    return Pairing(slot, place, before, returns_stream=False)


def _build_gpt(
    config: TransformerConfig,
    frac: ConnectionConfig | None,
    te: bool,
    exchanges_shapes: bool,
    norms: NormOptions,
    common: dict[str, Any],
) -> GPTModel:
    vp_stage = common["vp_stage"]
    spec: Any
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage)
    elif te:
        spec = get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=config.multi_latent_attention)
    else:
        spec = get_gpt_layer_local_spec(
            normalization="RMSNorm",
            multi_latent_attention=config.multi_latent_attention,
            qk_layernorm=config.qk_layernorm,
        )
    if not te and (config.multi_latent_attention or config.context_parallel_size > 1):
        for layer in getattr(spec, "layer_specs", [spec]):
            layer.submodules.self_attention.submodules.core_attention = TorchAttention
    spec = place_norms(spec, norms)
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=te, vp_stage=vp_stage)
    if frac is not None:
        spec = block_spec(spec, config, vp_stage) if frac.is_wide else spec
        spec = connect(spec, frac, exchanges_shapes=exchanges_shapes)
        mtp = connect(mtp, frac, exchanges_shapes=exchanges_shapes) if mtp is not None else None
    return GPTModel(config, spec, mtp_block_spec=mtp, **common)


def _randomise_biases(model: torch.nn.Module, seed: int) -> None:
    """Biases start at zero, where a forgotten one would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)


def randomise_connections(model: torch.nn.Module, seed: int = 5) -> None:
    """Move every connection parameter away from the identity, to values without any symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_connection_key(name):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def tokens(seed: int = 0, batch: int = 2) -> torch.Tensor:
    """Token numbers [batch, SEQUENCE + 1]."""
    return torch.randint(0, VOCABULARY, (batch, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))


def inputs(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Model inputs for `tokens`: ids, positions, causal mask (True is masked)."""
    length = t.shape[1] - 1
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return t[:, :-1], torch.arange(length).expand(t.shape[0], -1), mask


def seed_dropout(seed: int) -> None:
    """Fix the dropout masks of the next forward pass."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def logits(model: torch.nn.Module, t: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """Forward pass [batch, SEQUENCE, VOCABULARY]; the seed fixes the dropout masks."""
    seed_dropout(seed)
    return model(*inputs(t))


def loss(model: torch.nn.Module, t: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token."""
    return model(*inputs(t), labels=t[:, 1:]).float().mean()
