"""Options that Megatron's parser takes and nothing in a run of this project reads: refused, with the one that works."""

from argparse import Namespace

from megatron_fc.errors import UserError
from megatron_fc.training.megatron_arguments import megatron_arguments

_ENTRY = "use Megatron's pretrain_gpt.py with --spec megatron_fc.megatron.specs dfc_x4"
_DROP = "drop it"

# Groups of Megatron's parser, as their titles say, of models and loops that are not this one.
OTHER_GROUPS = ("biencoder", "vision", "rl")

# Read by other entry points or loops than this one.
OTHER_LOOPS = {
    "sft": _ENTRY,
    "fim_data": _ENTRY,
    "dataloader_inter_document_masking": _ENTRY,
    "hybrid_context_parallel": _ENTRY,
    "logits_load_dir": "use megatron-fc distill",
    "perform_rl_step": "use Megatron's train_rl.py",
    "inprocess_restart": "launch/ starts a run again",
    "lazy_mpu_init": _DROP,
    "yaml_cfg": "write its settings into the config",
    "use_checkpoint_args": "write them into the config",
    "per_dataset_sequences_path": _ENTRY,
    "object_storage_cache_path": "copy the data to a file system",
}

# Read by nothing in Megatron 0.19; tests/training/test_unused_options.py looks for more of them.
NEVER_READ = {
    "apply_residual_connection_post_layernorm": "residuals are taken before the norm, drop it",
    "dist_ckpt_save_pre_mcore_014": _DROP,
    "enable_full_sharding_in_hsdp": "set data_parallel_sharding_strategy with use_megatron_fsdp",
    "exit_signal_handler_for_dataloader": "set exit_signal_handler",
    "head_lr_mult": "set decoupled_lr",
    "max_tokens_to_oom": _DROP,
    "onnx_safe": _DROP,
    "openai_gelu": "Megatron's GELU is torch's, drop it",
    "rampup_batch_size": 'set step_batch_size_schedule, e.g. "0:768 250B:1536", in place of global_batch_size',
    "use_flash_attn": "set attention_backend=flash",
    "use_legacy_static_engine": _DROP,
    "vocab_extra_ids": "set padded_vocab_size, or add the tokens to the tokenizer",
}


def refuse_unused_options(args: Namespace) -> None:
    """Check that what a run sets is read.

    Args:
        args: Megatron's, parsed.

    Raises:
        UserError: names the option and the way out.
    """
    known = megatron_arguments()
    for name, remedy in OTHER_LOOPS.items():
        if getattr(args, name, None) != known.default(name):
            raise UserError(f"{name} is not supported by megatron-fc train: {remedy}")
    for name, remedy in NEVER_READ.items():
        if getattr(args, name, None) != known.default(name):
            raise UserError(f"{name} has no effect in Megatron 0.19: {remedy}")
    for group in OTHER_GROUPS:
        for name in known.group(group):
            if getattr(args, name, None) != known.default(name):
                raise UserError(
                    f"{name} is one of Megatron's options for {group}, which megatron-fc train does not do: drop it"
                )
    if args.full_validation and not args.multiple_validation_sets:
        raise UserError(
            "full_validation of one validation set fails in Megatron 0.19 behind the last step: set eval_iters to the "
            "number of its batches"
        )
    if args.dataloader_type == "external":
        raise UserError("dataloader_type=external wants a loader of your own script: set single or cyclic")
