"""Settings that differ between a checkpoint and the run that goes on with it: refused, announced, or no matter.

Megatron keeps all its arguments in a checkpoint and compares four of them. Here each one that differs counts: what
makes another model or other samples is refused, what has no influence on the training is passed over
(`_WITHOUT_INFLUENCE`), and everything else is announced and noted in the record of the start. So a setting that nobody
thought of is announced.
"""

import re
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from megatron_fc.checkpoints.integrity import INDEX
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import is_connection_argument
from megatron_fc.megatron.norm_options import MEGATRON_NORMS

# Settings by name: value in the checkpoint, value now.
Changes = dict[str, tuple[Any, Any]]

_MODEL = re.compile(
    r"""num_layers | hidden_size | ffn_hidden_size | num_attention_heads | group_query_attention | num_query_groups
    | kv_channels | hybrid_layer_pattern | is_hybrid_model | mtp_.* | transformer_input_.*
    | normalization | norm_after | layernorm_epsilon | layernorm_zero_centered_gamma | qk_layernorm
    | qk_layernorm_over_heads | qk_l2_norm
    | apply_residual_connection_post_layernorm
    | swiglu | squared_relu | openai_gelu | quick_geglu | glu_linear_offset | activation_func_clamp_value
    | add_bias_linear | add_qkv_bias | add_position_embedding | untie_embeddings_and_output_weights
    | position_embedding_type | rotary_.* | rope_.* | use_rope_scaling | no_rope_freq | mscale.* | yarn_.*
    | mrope_section | relative_attention_.* | window_.* | softmax_type | attention_output_gate
    | experimental_attention_variant | dsa_.* | multi_latent_attention | q_lora_rank | kv_lora_rank | qk_head_dim
    | qk_pos_emb_head_dim | v_head_dim | mamba_(head_dim|num_groups|num_heads|state_dim) | linear_.*
    | num_experts | moe_ffn_hidden_size | moe_layer_freq | moe_latent_size | moe_shared_expert_(gate|intermediate_size)
    | moe_router_(topk|pre_softmax|score_function|topk_scaling_factor|num_groups|group_topk|enable_expert_bias)
    | mup_.* | use_mup | heterogeneous_layers_.*""",
    re.VERBOSE,
)
_SAMPLES = re.compile(r"tokenizer_type | seq_length", re.VERBOSE)
_STATE = re.compile(r"optimizer | bf16 | fp16", re.VERBOSE)
_DATA = re.compile(
    r"seed | .*data_path | .*data_args_path | split | mock_data | dataloader_type | data_sharding", re.VERBOSE
)
_COUNT = ("train_iters", "train_samples", "global_batch_size")
_WITHOUT_INFLUENCE = re.compile(
    r"""padded_vocab_size | vocab_size | make_vocab_size_divisible_by | tokenizer_digest
    | consumed_.* | skipped_.* | (curr_)?iteration | do_(train|valid|test) | num_floating_point_operations_so_far
    | (local_)?rank | world_size | _.* | transformer_pipeline_model_parallel_size | params_dtype | spec
    | max_position_embeddings | (encoder|decoder)_(num_layers|seq_length)
    | load | save | finetune | no_(load|save)_(optim|rng) | ckpt_.* | use_.*checkpoint.* | exit_on_missing_checkpoint
    | override_opt_param_scheduler | pretrained_checkpoint | override_ckpt_iteration
    | dist_ckpt.* | async_.* | use_persistent_ckpt_worker | (non_persistent_)?save_.* | non_persistent_.*
    | verify_integrity | eval_.* | start_eval_at_iter | full_validation | (valid|test)_data_path | skip_train
    | (log|tensorboard|wandb|one_logger|app_tag|profile|pytorch_profiler|record|straggler|timing|logging)_.* | profile
    | memory_snapshot_path | nvtx_ranges | disable_straggler_on_startup | enable_(one_logger|msc|ft_package)
    | data_cache_path | num_workers | num_dataset_builder_threads | mmap_bin_files | dataloader_(fast|defer)_.*
    | object_storage_.* | exit_.* | distributed_timeout_.* | nccl_.* | flight_recorder_.* | manual_gc.* | inprocess_.*
    | rerun_mode | result_rejected_.* | iterations_to_skip | error_injection_.* | fault_injector_.* | ft_.* | calc_ft_.*
    | gpu_sniff_.* | check_.* | inference_.* | rl_.* | grpo_.* | overlap_.* | tp_comm_.* | align_.* | recompute_.*
    | cuda_graph_.* | .*offload.* | .*_fusion | ddp_(num_buckets|bucket_size|pad_buckets_.*) | (megatron_)?fsdp_.*
    | moe_(deepep|hybridep|flex|ncclep|permute|paged_stash)_.* | moe_enable_deepep | moe_per_layer_logging
    | moe_routing_trace_.* | moe_token_dispatcher_type | train_sync_interval | trust_remote_code""",
    re.VERBOSE,
)
# Megatron fills these in where they are not set, when the model is there.
_FILLED_IN = ("train_iters", "lr_decay_iters", "lr_decay_samples")


def stored_args(checkpoint: Path) -> Namespace | None:
    """Return Megatron's arguments as a `torch_dist` checkpoint holds them, None in one of another format."""
    from megatron.core import dist_checkpointing

    if not (checkpoint / INDEX).exists():
        return None
    stored: Namespace | None = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return stored


def changes(stored: Namespace | None, args: Namespace) -> Changes:
    """Return what differs and has an influence, of the arguments that both have.

    A checkpoint that is older than the options of norms has Megatron's norms.
    """
    before, now = asdict(MEGATRON_NORMS) | vars(stored) if stored is not None else {}, vars(args)
    return {
        name: (before[name], now[name])
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name] and not _has_no_influence(name) and not _is_derived(name, now)
    }


def is_model_setting(name: str) -> bool:
    """Whether runs that differ in this argument of Megatron's train different models, apart from connections."""
    return _MODEL.fullmatch(name) is not None


def refuse_changes(checkpoint: Path, changed: Changes, *, fresh_optimizer: bool) -> None:
    """Check that a run which goes on with a checkpoint is the one that wrote it.

    Args:
        checkpoint: the one.
        changed: since it was written.
        fresh_optimizer: the optimizer's state is not taken over.

    Raises:
        UserError: names the setting, both values and the remedy.
    """
    for name, values in changed.items():
        if _MODEL.fullmatch(name):
            _refuse(checkpoint, name, values, "another model", f"finetune=true load={checkpoint.parent}")
        elif _SAMPLES.fullmatch(name):
            _refuse(checkpoint, name, values, "other samples", f"finetune=true load={checkpoint.parent}")
        elif _STATE.fullmatch(name) and not fresh_optimizer:
            _refuse(checkpoint, name, values, "another state", f"no_load_optim=true load={checkpoint.parent}")
    experts = changed.get("expert_model_parallel_size", (1, 1))
    if not fresh_optimizer and 1 in experts and experts != (1, 1):
        name = "expert_model_parallel_size"
        _refuse(checkpoint, name, experts, "another state", f"no_load_optim=true load={checkpoint.parent}")


def refuse_other_model(checkpoint: Path, args: Namespace) -> None:
    """Check that a model which a checkpoint is loaded into, and not trained, is the checkpoint's own.

    Args:
        checkpoint: the one.
        args: Megatron's, validated.

    Raises:
        UserError: names the first setting with both values, and all others.
    """
    changed = changes(stored_args(checkpoint), args)
    if names := [name for name in changed if _MODEL.fullmatch(name)]:
        before, now = map(_short, changed[names[0]])
        others = f", as {'do' if len(names) > 2 else 'does'} {', '.join(names[1:])}" if names[1:] else ""
        raise UserError(
            f"{names[0]}: {before} in {checkpoint}, {now} here, which makes another model{others}: give what it was "
            f"written with"
        )


def refuse_other_batch(checkpoint: Path, changed: Changes, args: Namespace) -> None:
    """Check that a run which is counted in samples keeps its batch, as Megatron divides all samples by one size.

    Raises:
        UserError: it would end at another sample than `train_samples` says; names the remedy.
    """
    if "global_batch_size" not in changed or args.train_samples is None or args.step_batch_size_schedule:
        return
    before, now = changed["global_batch_size"]
    stored = stored_args(checkpoint)
    tokens = getattr(stored, "consumed_train_samples", 0) * args.seq_length
    raise UserError(
        f"global_batch_size: {before} in {checkpoint}, {now} here, and Megatron divides all train_samples by one size: "
        f"set global_batch_size=null step_batch_size_schedule='0:{before} {tokens}:{now}', which says from which token "
        f"on"
    )


def refuse_other_vocabulary(checkpoint: Path, args: Namespace) -> None:
    """Check that tokens mean what they meant to a checkpoint. Megatron would cut the embedding to size, or pad it.

    Args:
        checkpoint: that a run goes on with.
        args: Megatron's, once it has built the tokenizer.

    Raises:
        UserError: the tokenizer or the padded vocabulary is another; names the remedy.
    """
    stored = stored_args(checkpoint) or Namespace()
    before, now = getattr(stored, "padded_vocab_size", None), args.padded_vocab_size
    if None not in (before, now) and before != now:
        size = args.tensor_model_parallel_size
        raise UserError(
            f"padded_vocab_size: {before} in {checkpoint}, {now} here: give the tokenizer and the vocab_size that it "
            f"was written with, and a make_vocab_size_divisible_by whose product with "
            f"tensor_model_parallel_size={size} is what it was"
        )
    of_stored, digest = getattr(stored, "tokenizer_digest", None), args.tokenizer_digest
    if None not in (of_stored, digest) and not digest.startswith(of_stored):  # an older checkpoint has half of it
        raise UserError(
            f"tokenizer_model={args.tokenizer_model} makes other tokens of a text than the one that {checkpoint} was "
            f"trained with, {getattr(stored, 'tokenizer_model', None)}: give that one, or begin a run of its own, "
            f"finetune=true load={checkpoint.parent} and another run_dir"
        )


def announced(checkpoint: Path, changed: Changes) -> list[str]:
    """Say what changes from a checkpoint on, a line each; [] where nothing does."""
    if not changed:
        return []
    lines = [f"note: changed since {checkpoint.name}: {described(changed)}"]
    if order := [name for name in changed if _DATA.fullmatch(name)]:
        lines.append(
            f"note: with {' and '.join(order)} the order of the data changes: what this run has read may come again"
        )
    elif count := [name for name in changed if name in _COUNT]:
        lines.append(f"note: with {' and '.join(count)} the order of data that are read more than once may change")
    return lines


def described(changed: Changes) -> str:
    """Return e.g. ``lr 0.001 -> 0.003, seed 1 -> 2``."""
    return ", ".join(f"{name} {_short(before)} -> {_short(now)}" for name, (before, now) in changed.items())


def _refuse(checkpoint: Path, name: str, values: tuple[Any, Any], what: str, remedy: str) -> None:
    before, now = map(_short, values)
    raise UserError(
        f"{name}: {before} in {checkpoint}, {now} here, which makes {what}: give what it was written with, or begin a "
        f"run of its own, {remedy} and another run_dir"
    )


def _has_no_influence(name: str) -> bool:
    """Connections have a check of their own (`structure`), the vocabulary has `refuse_other_vocabulary`."""
    return is_connection_argument(name) or _WITHOUT_INFLUENCE.fullmatch(name) is not None


def _is_derived(name: str, now: dict[str, Any]) -> bool:
    if name in _FILLED_IN and now[name] is None:
        return True
    if name == "global_batch_size" and now.get("step_batch_size_schedule"):
        return True
    return name == "num_query_groups" and not now.get("group_query_attention")


def _short(value: Any) -> str:
    return shorten(str(value), 80)
