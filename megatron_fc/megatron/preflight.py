"""What a recipe needs of the nodes and file systems that it is about to run on."""

import os
from argparse import Namespace
from pathlib import Path

from megatron_fc.megatron.integrity import intact_checkpoints
from megatron_fc.megatron.recipe import Recipe, data_files
from megatron_fc.megatron.setup import parse
from megatron_fc.preflight import Plan

_BYTES_IN_MEMORY = 18  # that Megatron counts per parameter, gradient and optimizer included, where nothing is shared


def plan_of(recipe: Recipe) -> Plan:
    """Let Megatron check the recipe's arguments for this world; return what the run needs.

    Raises:
        UserError: they are refused.
    """
    args = parse(recipe)
    # Without a CUDA device the recipe adapts itself to the CPU lane; on a cluster only a config that says so means it.
    asked = {name: value for values in recipe.sections.values() for name, value in values.items()}
    return Plan(
        run_dir=recipe.run_dir,
        files=data_files(args),
        on_devices=asked.get("distributed_backend", "nccl") == "nccl",
        checkpoint_bytes=_checkpoint_bytes(args),
        checkpoints=1 + (recipe.retention.last if recipe.retention else 1),  # one more while the next is written
    )


def _checkpoint_bytes(args: Namespace) -> int | None:
    """Of the run's own newest one; before there is any, by Megatron's count of parameters."""
    newest = next(iter(intact_checkpoints(Path(args.save))), None) if args.save else None
    if newest is None:
        return _expected_bytes(args) if args.save else None
    return sum(os.path.getsize(file) for file in newest.rglob("*") if file.is_file())


def _expected_bytes(args: Namespace) -> int | None:
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if args.vocab_size is None or args.hybrid_layer_pattern:  # which Megatron does not count here
        return None
    whole = Namespace(**vars(args))
    whole.use_distributed_optimizer = False
    for kind in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor"):
        setattr(whole, f"{kind}_parallel_size", 1)
    whole.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
    )
    parameters = compute_weight_and_optimizer_memory(whole) / _BYTES_IN_MEMORY
    # Weights, two moments, and for half precision the fp32 weights.
    return int(parameters * (2 + 12 if args.bf16 or args.fp16 else 4 + 8))
