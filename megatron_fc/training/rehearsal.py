"""A rehearsal of a run's start: what Megatron computes of numbers alone, done before a rank waits for another.

The login node (`megatron-fc topology`), the pre-flight check and the run call the same functions, so what one refuses
all refuse. None needs a GPU, data or a process group.
"""

import copy
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.training.precision import has_dense_mlp
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.refusal import refusals_named
from megatron_fc.training.setup import model_config, quiet


def rehearse(args: Namespace, recipe: Recipe) -> None:
    """Check all that numbers alone show.

    Args:
        args: Megatron's, validated; they stay as they are.
        recipe: the run.

    Raises:
        UserError: Megatron would refuse the run before its first step.
    """
    rehearse_schedule(args)
    rehearse_model(args, recipe)


def rehearse_schedule(args: Namespace) -> None:
    """The counts of samples, the optimizer's numbers, the schedules of learning rate and weight decay."""
    from megatron.core import num_microbatches_calculator as micro_batches
    from megatron.training import global_vars, training

    if args.lr is None and not args.skip_train:
        raise UserError("lr is not set: set it")
    if args.eval_interval is None and not (args.skip_train or args.full_validation):
        raise UserError("eval_interval is not set: set it; eval_iters=0 leaves validation out")
    _refuse_long_warmup(args)
    args, before = copy.deepcopy(args), (global_vars._GLOBAL_ARGS, micro_batches._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    global_vars._GLOBAL_ARGS, micro_batches._GLOBAL_NUM_MICROBATCHES_CALCULATOR = args, None
    try:
        with refusals_named("the batches"):
            micro_batches.init_num_microbatches_calculator(
                rank=1,  # the first one logs it
                global_batch_size=args.global_batch_size,
                micro_batch_size=args.micro_batch_size,
                data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
                decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
                step_batch_size_schedule=args.step_batch_size_schedule,
                seq_length=args.seq_length,
            )
        if args.skip_train:
            return
        with refusals_named("the schedule"), quiet():
            optimizer, _ = training.get_megatron_optimizer_config(args)
            _refuse_as_adam_does(optimizer)
            training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
        with refusals_named("the data"):
            training.get_train_valid_test_num_samples()
    finally:
        global_vars._GLOBAL_ARGS, micro_batches._GLOBAL_NUM_MICROBATCHES_CALCULATOR = before


def rehearse_model(args: Namespace, recipe: Recipe, *, elsewhere: bool = False) -> None:
    """Megatron's configuration of the model, with a stand-in for a vocabulary that only the tokenizer knows.

    Args:
        elsewhere: the run is for other machines, whose packages the layers of a hybrid stack would need.
    """
    from megatron.training.argument_utils import hybrid_config_from_args

    args = copy.deepcopy(args)
    if args.padded_vocab_size is None and args.vocab_size is None:
        args.padded_vocab_size = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    _refuse_groups(args)
    _refuse_pattern(args)
    _refuse_indivisible(args)
    with refusals_named("the model"):
        if elsewhere and recipe.family == "hybrid":
            hybrid_config_from_args(args)
        else:
            model_config(args, recipe)


def _refuse_as_adam_does(config: Any) -> None:
    """torch's optimizer checks its numbers when it is built."""
    if config.optimizer != "adam":
        return
    for name, value in (("lr", config.lr), ("adam_eps", config.adam_eps), ("weight_decay", config.weight_decay)):
        if not value >= 0:
            raise UserError(f"{name}={value} must be at least 0")
    for name, value in (("adam_beta1", config.adam_beta1), ("adam_beta2", config.adam_beta2)):
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} must be at least 0 and below 1")


def _refuse_long_warmup(args: Namespace) -> None:
    """Megatron's assertion counts both in samples, under names that no config has."""
    if args.skip_train:
        return
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise UserError(f"lr_warmup_fraction={args.lr_warmup_fraction} must be at least 0 and below 1: it is a share")
    unit = "iters" if args.train_iters else "samples"
    warmup = getattr(args, f"lr_warmup_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    if args.lr_warmup_fraction is None and decay and warmup >= decay:
        named = f"lr_decay_{unit}" if getattr(args, f"lr_decay_{unit}") else f"train_{unit}"
        raise UserError(
            f"lr_warmup_{unit}={warmup} is not below {named}={decay}, which counts the warm-up in: lower it, or raise "
            f"lr_decay_{unit}"
        )


def _refuse_pattern(args: Namespace) -> None:
    """Which Megatron finds when it builds the layers."""
    pattern, layers = args.moe_layer_freq, args.num_layers
    if isinstance(pattern, list) and args.num_experts and len(pattern) != layers and not args.hybrid_layer_pattern:
        raise UserError(f"moe_layer_freq={pattern} has {len(pattern)} entries, and num_layers={layers}: give one each")
    if isinstance(pattern, int) and pattern < 1:
        raise UserError(f"moe_layer_freq={pattern} must be at least 1; a list of 0 and 1, one per layer, says which")


def _refuse_indivisible(args: Namespace) -> None:
    """Sizes that tensor parallelism divides, which Megatron finds when it builds a layer or runs it."""
    tensor, expert_tensor = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    split = []
    if has_dense_mlp(args):
        split.append(("ffn_hidden_size", args.ffn_hidden_size, "tensor_model_parallel_size", tensor))
    if args.num_experts:
        moe_size, shared = args.moe_ffn_hidden_size or args.ffn_hidden_size, args.moe_shared_expert_intermediate_size
        split.append(("moe_ffn_hidden_size", moe_size, "expert_tensor_parallel_size", expert_tensor))
        split.append(("moe_shared_expert_intermediate_size", shared or 0, "tensor_model_parallel_size", tensor))
    if args.sequence_parallel:
        ranks = tensor * args.context_parallel_size
        split.append(("seq_length", args.seq_length, "tensor x context parallelism", ranks))
    for name, size, by, ranks in split:
        if size % ranks:
            raise UserError(f"{name}={size} is no multiple of {by}={ranks}: choose another size, or fewer ranks")


def _refuse_groups(args: Namespace) -> None:
    """Which Megatron finds in the first forward pass, as a shape."""
    groups, heads = args.num_query_groups, args.num_attention_heads
    if args.group_query_attention and groups and heads % groups:
        raise UserError(f"num_query_groups={groups} does not divide num_attention_heads={heads}: choose one that does")
