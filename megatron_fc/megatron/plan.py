"""What a recipe needs of the nodes and file systems that it is about to run on."""

import os
from argparse import Namespace
from pathlib import Path

from megatron_fc.megatron.integrity import intact_checkpoints
from megatron_fc.megatron.pretrain import parse
from megatron_fc.megatron.recipe import Recipe, data_files
from megatron_fc.preflight import Plan


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
    """Of the run's own newest one; before there is any, nothing is known."""
    newest = next(iter(intact_checkpoints(Path(args.save))), None) if args.save else None
    if newest is None:
        return None
    return sum(os.path.getsize(file) for file in newest.rglob("*") if file.is_file())
