"""Tiny OLMoE and OLMo2: as models of the layouts' tests, and as configs that say the same."""

from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_fc.connections.base import ConnectionConfig
from support import tiny
from support.layouts import DFC, DHC, LEARNED, MHC, OLMO2, OLMOE, Layout, Model
from support.prompts import write_tokenizer

TP2_PP2_EP2 = Layout("TP2+SP+PP2+EP2", 4, tp=2, sequence=True, pp=2, ep=2)
KINDS = {"olmoe": ("moe", OLMOE), "olmo2": ("dense", OLMO2)}
CONNECTIONS: dict[str, ConnectionConfig | None] = {"plain": None, "dfc_x4": DFC, "dhc_x4": DHC, "mhc_x4": MHC}
# What is one setting away from these.
WORDS = {
    "plain": ["connection=residual"],
    "dfc_x4": [],
    "dhc_x4": ["connection=dhc"],
    "mhc_x4": ["connection=mhc"],
    "learned": ["connection=mhc", "leave=learned"],
    "bf16": [],
}


def model(architecture: str, connection: str) -> Model:
    kind, norms = KINDS[architecture]
    made = LEARNED if connection == "learned" else CONNECTIONS[connection]
    return Model(kind, 2, made, "random", norms=norms)


def write_config(folder: Path, architecture: str) -> Path:
    """A config of the model, with DFCx4, and its tokenizer; returns the config's path."""
    write_tokenizer(folder / "tokenizer")
    model: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": tiny.WIDTH,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 128,
        "vocab_size": tiny.VOCABULARY,
        "seq_length": tiny.SEQUENCE,
        "max_position_embeddings": tiny.SEQUENCE,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "qk_layernorm_over_heads": True,
        "norm_after": architecture == "olmo2",
        "swiglu": True,
        "disable_bias_linear": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if architecture == "olmoe":
        model |= {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64, "moe_router_pre_softmax": True}
        model |= {"moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall"}
        model["moe_aux_loss_coeff"] = 0.01
    sections = {
        "model": model,
        "connections": {"connection": "dfc", "rate": 4},
        "data": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder / "tokenizer")},
        "optimizer": {"train_iters": 2, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-3, "eval_iters": 1},
        "checkpoint": {"ckpt_format": "torch_dist"},
        "logging": {"run_dir": str(folder / "run")},
    }
    path = folder / f"{architecture}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def huggingface_model(architecture: str, **more: Any) -> Any:
    """A model of transformers with random weights, of the size that the config says."""
    from transformers import Olmo2Config, Olmo2ForCausalLM, OlmoeConfig, OlmoeForCausalLM

    values: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": tiny.WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": tiny.SEQUENCE,
        "eos_token_id": 126,
        "pad_token_id": 127,
    }
    if architecture == "olmoe":
        model: Any = OlmoeForCausalLM(
            OlmoeConfig(**{**values, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, **more})
        )
    else:
        model = Olmo2ForCausalLM(Olmo2Config(**{**values, "intermediate_size": 128, **more}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_model(architecture: str, target: Path, **more: Any) -> None:
    """Write one as a folder of Hugging Face."""
    huggingface_model(architecture, **more).save_pretrained(target)
