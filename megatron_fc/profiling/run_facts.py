"""Facts of a run in a traffic report: the model, the layout, this rank's place and its layers' in the whole."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_fc.runs.summary import git_commit, package_versions

# What decides the bytes of a step beside the fields of Megatron's configuration of a transformer, or has another name
# among the arguments.
_BESIDE = (
    "seq_length",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "micro_batch_size",
    "global_batch_size",
    "params_dtype",
    "num_experts",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "bias_swiglu_fusion",
    "bias_gelu_fusion",
    "hybrid_layer_pattern",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "fp8_param_gather",
    "optimizer",
    "optimizer_cpu_offload",
    "use_precision_aware_optimizer",
    "accumulate_allreduce_grads_in_fp32",
    "overlap_grad_reduce",
    "overlap_param_gather",
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
    "distributed_optimizer_instances": "num_distributed_optimizer_instances",
}


def model_facts(args: Namespace) -> dict[str, Any]:
    """What decides the bytes of a step, but for connection and layout, as JSON knows it; what is not set is left out.

    That is every field of Megatron's configuration that is an argument, functions and objects left out, and `_BESIDE`.
    """
    names = [*_BESIDE, *(field.name for field in fields(MLATransformerConfig))]
    values = {name: getattr(args, name, None) for name in names if name not in _LAYOUT.values()}
    plain = (int, float, str, list, torch.dtype, Enum)
    return {name: _for_json(value) for name, value in values.items() if isinstance(value, plain)}


def _for_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_for_json(item) for item in value]
    return str(value) if isinstance(value, (torch.dtype, Enum)) else value


def layout(args: Namespace, hosts: Sequence[str]) -> dict[str, Any]:
    """Parallel sizes.

    Args:
        args: Megatron's, validated.
        hosts: of all ranks.
    """
    sizes = {name: getattr(args, argument) for name, argument in _LAYOUT.items()}
    sizes["vpp"] = sizes["vpp"] or 1
    return {"world_size": args.world_size, "nodes": len(set(hosts)), **sizes}


def origin() -> dict[str, Any]:
    """The device, the date of rank 0 and the versions, as `Run` has them; every rank calls it."""
    date = [datetime.now(UTC).isoformat(timespec="seconds")]
    torch.distributed.broadcast_object_list(date, src=0)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": date[0],
        "versions": package_versions(),
        "git_commit": git_commit(),
    }


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
