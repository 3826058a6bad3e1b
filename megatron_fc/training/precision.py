"""Precisions by name, and what cannot be: refused before a model is built, from arguments and the device's capability.

Products of Transformer Engine's layers alone run in FP8 or FP4. Frac-Connections take their input in 16 bits, compute
in fp32 and keep fp32 parameters (docs/precision.md).
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fc.errors import UserError, unknown

Capability = tuple[int, int]

_BF16 = {"bf16": True}
_FP8 = {**_BF16, "fp8_format": "hybrid"}
_E4M3 = {**_BF16, "fp8_format": "e4m3"}

# Name -> Megatron's settings. The history of delayed scaling is Transformer Engine's default; Megatron's is one step.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": _BF16,
    "fp8_delayed": {**_FP8, "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    "fp8_tensorwise": {**_FP8, "fp8_recipe": "tensorwise"},
    "fp8_blockwise": {**_E4M3, "fp8_recipe": "blockwise"},
    "mxfp8": {**_E4M3, "fp8_recipe": "mxfp8"},
    "nvfp4": {**_BF16, "fp4_format": "e2m1", "fp4_recipe": "nvfp4"},
}


@dataclass(frozen=True)
class _Kind:
    """What a kind of scaling asks for: devices from `since` to before `until`, sizes that are multiples."""

    since: Capability
    until: tuple[float, int]
    multiple: int
    remedy: str


_ANY = (math.inf, 0)
_KINDS = {
    "delayed": _Kind((8, 9), _ANY, 16, "use precision=bf16"),
    "tensorwise": _Kind((8, 9), _ANY, 16, "use precision=bf16"),
    # Transformer Engine would emulate it by MXFP8 on Blackwell.
    "blockwise": _Kind((9, 0), (10, 0), 16, "use precision=mxfp8 on Blackwell, fp8_tensorwise elsewhere"),
    "mxfp8": _Kind((10, 0), (12, 0), 32, "use precision=fp8_tensorwise or, on Hopper, fp8_blockwise"),
    "nvfp4": _Kind((10, 0), _ANY, 16, "use precision=fp8_tensorwise or, on Hopper, fp8_blockwise"),
}


def apply_precision(settings: dict[str, Any]) -> None:
    """Replace `precision` in a run's settings by Megatron's settings for it.

    Raises:
        UserError: the name is unknown, or a setting says otherwise.
    """
    name = settings.pop("precision", None)
    if name is None:
        return
    if name not in PRECISIONS:
        raise UserError(unknown("precision", str(name), PRECISIONS))
    for key in ("fp16", "bf16", "fp8_format", "fp8_recipe", "fp4_format", "fp4_recipe", *PRECISIONS[name]):
        wanted, found = PRECISIONS[name].get(key), settings.get(key)
        if found not in (None, wanted) and not (wanted is None and found is False):
            raise UserError(f"{key}={found} contradicts precision={name}: drop one of the two")
    settings.update(PRECISIONS[name])


def config_fields(name: str) -> dict[str, Any]:
    """The settings of a precision as fields of Megatron's TransformerConfig."""
    renamed = {"fp8_format": "fp8", "fp4_format": "fp4"}
    fields = {renamed.get(key, key): value for key, value in PRECISIONS[name].items()}
    return {**fields, "params_dtype": torch.bfloat16}


def refuse_on_device(args: Any, capability: Capability | None) -> None:
    """Check that a device can run a precision.

    Args:
        args: Megatron's arguments, or its TransformerConfig.
        capability: compute capability of the device, None where there is no CUDA device.

    Raises:
        UserError: it cannot; names the devices that can.
    """
    what = low_precision(args)
    if what is None:
        return
    if capability is None:
        raise UserError(f"{what} needs a GPU, and torch sees no CUDA device: use precision=bf16 or a machine with one")
    kind = _kind(args)
    if kind is not None and not kind.since <= capability < kind.until:
        before = "" if kind.until is _ANY else f" and below {_version(kind.until)}"
        raise UserError(
            f"{what} needs a GPU of compute capability {_version(kind.since)} or newer{before}, and this one has "
            f"{_version(capability)}: {kind.remedy}"
        )


def refuse_impossible(args: Namespace) -> None:
    """Check what arguments alone show, as they are before Megatron validates them.

    Raises:
        UserError: options exclude one another, or a size is no multiple of what the products ask for.
    """
    what, recipe = low_precision(args), getattr(args, "fp8_recipe", None)
    if args.fp8 and args.fp4:
        raise UserError(f"fp8_format={args.fp8} and fp4_format={args.fp4} exclude one another: drop one")
    for option, on in (("fp8_param_gather", args.fp8), ("fp4_param_gather", args.fp4)):
        if getattr(args, option) and not on:
            raise UserError(f"{option} keeps weights in a precision that is not on: set precision, or drop it")
        sharded = args.use_distributed_optimizer or args.use_megatron_fsdp or args.use_torch_fsdp2
        if getattr(args, option) and not sharded:
            raise UserError(
                f"{option} needs master weights of the distributed optimizer: set use_distributed_optimizer"
            )
    if what is None:
        if args.moe_router_padding_for_quantization:
            raise UserError("moe_router_padding_for_quantization pads for FP8 or FP4, which is not on: set precision")
        return
    if args.transformer_impl == "local":
        raise UserError(
            f"{what} has no effect on Megatron's local layers: set transformer_impl=transformer_engine, or drop it"
        )
    if args.fp8 and recipe == "delayed":
        if args.first_last_layers_bf16:
            raise UserError(
                "first_last_layers_bf16 leaves and enters FP8 between layers, which delayed scaling does not support: "
                "use precision=fp8_tensorwise or fp8_blockwise"
            )
        again = {"moe_act", "layernorm"} & set(args.recompute_modules or ())
        if args.recompute_granularity == "selective" and again:
            raise UserError(
                f"recompute_modules={sorted(again)} does not go with delayed scaling: use precision=fp8_tensorwise or "
                f"fp8_blockwise"
            )
    _refuse_sizes(args, what)


def _refuse_sizes(args: Namespace, what: str) -> None:
    kind = _kind(args)
    if kind is None:  # a recipe of the user's own
        return
    for name, size in _sizes(args):
        if size % kind.multiple:
            raise UserError(
                f"{what} needs sizes that are multiples of {kind.multiple}, and {name} is {size}: change it, or use "
                f"precision=bf16"
            )


def _sizes(args: Namespace) -> Iterator[tuple[str, int]]:
    """Rows and columns of the products on one rank; those of an expert are padded by Megatron."""
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    shards = context * (tensor if args.sequence_parallel else 1)
    if args.micro_batch_size and args.seq_length:
        by = "CP x TP" if args.sequence_parallel else "CP"
        yield f"micro_batch_size x seq_length / ({by})", args.micro_batch_size * args.seq_length // shards
    if not args.hidden_size:
        return
    yield "hidden_size", args.hidden_size
    heads = args.num_attention_heads
    if heads and args.multi_latent_attention:
        query, rope = args.qk_head_dim, args.qk_pos_emb_head_dim
        if args.q_lora_rank:
            yield "q_lora_rank", args.q_lora_rank
        yield "kv_lora_rank", args.kv_lora_rank
        yield "kv_lora_rank + qk_pos_emb_head_dim", args.kv_lora_rank + rope
        yield "heads x (qk_head_dim + qk_pos_emb_head_dim) / TP", heads * (query + rope) // tensor
        yield "heads x (qk_head_dim + v_head_dim) / TP", heads * (query + args.v_head_dim) // tensor
        yield "heads x v_head_dim / TP", heads * args.v_head_dim // tensor
    elif heads:
        head = args.kv_channels or args.hidden_size // heads
        groups = args.num_query_groups if args.group_query_attention else heads
        yield "heads x kv_channels / TP", heads * head // tensor
        yield "query, key and value channels / TP", (heads + 2 * groups) * head // tensor
    if args.ffn_hidden_size and has_dense_mlp(args):
        yield "ffn_hidden_size / TP", args.ffn_hidden_size // tensor
    if args.num_experts and args.moe_ffn_hidden_size:
        yield "moe_ffn_hidden_size / ETP", args.moe_ffn_hidden_size // (args.expert_tensor_parallel_size or tensor)
    if args.num_experts and args.moe_shared_expert_intermediate_size:
        yield "moe_shared_expert_intermediate_size / TP", args.moe_shared_expert_intermediate_size // tensor


def has_dense_mlp(args: Namespace) -> bool:
    """Whether a layer has an MLP without experts, `ffn_hidden_size` wide."""
    if args.hybrid_layer_pattern:
        return "-" in args.hybrid_layer_pattern
    frequency = args.moe_layer_freq
    return not args.num_experts or (frequency != 1 if isinstance(frequency, int) else 0 in frequency)


def low_precision(args: Any) -> str | None:
    """Return a low precision as a sentence names it, None where it is off."""
    if args.fp8:
        return f"fp8_recipe={args.fp8_recipe}"
    return f"fp4_recipe={args.fp4_recipe}" if args.fp4 else None


def refuse_unquantizable(args: Namespace) -> None:
    """Check that ModelOpt's quantised layers can compute in a run.

    Args:
        args: Megatron's, validated or not.

    Raises:
        UserError: it runs in FP8 or FP4, or splits experts and the tensors of other layers at once.
    """
    if what := low_precision(args):
        raise UserError(
            f"{what} is Transformer Engine's and does not go with ModelOpt's quantizers: add precision=bf16 "
            f"fp8_param_gather=false"
        )
    tensor, expert = args.tensor_model_parallel_size, args.expert_model_parallel_size
    one_by_one = not args.moe_grouped_gemm or args.transformer_impl == "local"
    if tensor > 1 and expert > 1 and one_by_one:
        raise UserError(
            f"tensor_model_parallel_size={tensor} with expert_model_parallel_size={expert}: ModelOpt quantises single "
            f"experts under one of the two only, set the other to 1"
        )


def _kind(args: Any) -> _Kind | None:
    return _KINDS.get(args.fp8_recipe if args.fp8 else args.fp4_recipe)


def _version(capability: tuple[float, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
