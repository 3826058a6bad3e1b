"""What a traffic report says of a run: the model, the layout, and where this rank and its layers are in the whole."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state

# What decides the bytes of a step, but for the connection.
_MODEL = (
    "num_layers",
    "hybrid_layer_pattern",
    "mtp_num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "multi_latent_attention",
    "num_experts",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_token_dispatcher_type",
    "seq_length",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "normalization",
    "qk_layernorm",
    "micro_batch_size",
    "global_batch_size",
    "params_dtype",
    "fp8",
    "fp32_residual_connection",
    "hidden_dropout",
    "attention_dropout",
    "transformer_impl",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "optimizer",
)
_LAYOUT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dp": "data_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "distributed_optimizer": "use_distributed_optimizer",
}


def model_facts(args: Namespace) -> dict[str, Any]:
    """What decides the bytes of a step, but for the connection, as JSON knows it; what is not set is left out."""
    values = {name: getattr(args, name, None) for name in _MODEL}
    return {
        name: value if isinstance(value, (int, float, str, list)) else str(value)
        for name, value in values.items()
        if value is not None
    }


def layout(args: Namespace, hosts: Sequence[str]) -> dict[str, Any]:
    """Parallel sizes.

    Args:
        args: Megatron's, validated.
        hosts: of all ranks.
    """
    sizes = {name: getattr(args, argument) for name, argument in _LAYOUT.items()}
    sizes["vpp"] = sizes["vpp"] or 1
    return {"world_size": args.world_size, "nodes": len(set(hosts)), **sizes}


def coordinates() -> dict[str, int]:
    """This rank's place in each parallelism."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "cp": parallel_state.get_context_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "dp": parallel_state.get_data_parallel_rank(),
    }


def paths_in_whole_model(chunks: Sequence[Any]) -> Callable[[str], str]:
    """Return what turns a path as `Whereabouts` gives it into the path in the whole model.

    A pipeline stage numbers its layers from 0; with several chunks on a stage, paths begin with the chunk's number.

    Args:
        chunks: of this rank's model, unwrapped.
    """
    layers = {}
    for number, chunk in enumerate(chunks):
        prefix = f"{number}." if len(chunks) > 1 else ""
        for name, module in chunk.named_modules():
            if re.fullmatch(r"decoder\.layers\.\d+", name):
                layers[prefix + name] = f"decoder.layers.{module.layer_number - 1}"

    def in_whole_model(path: str) -> str:
        found = re.match(r"(?:\d+\.)?decoder\.layers\.\d+", path)
        return layers[found[0]] + path[found.end() :] if found else re.sub(r"^\d+\.?", "", path)

    return in_whole_model
