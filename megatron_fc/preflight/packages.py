"""Packages that a run on GPUs needs of the Python that starts it: Transformer Engine, or Apex for the optimizer.

Megatron's distributed optimizer writes its state with torch's Adam as well, but cannot read it: to load, it first asks
a fresh optimizer for the steps in its state, of which torch's has none yet, and ends in an assertion without a word
(`DistributedOptimizer.state_dict` of megatron-core 0.19, for every format of the checkpoint).
"""

import sys
from argparse import Namespace

from megatron_fc.errors import UserError
from megatron_fc.training.machine import has_apex, has_transformer_engine
from megatron_fc.training.recipe import Recipe

_IMAGE = "use the image of docker/README.md"


def is_on_devices(recipe: Recipe) -> bool:
    """Whether a config means CUDA devices; without one a recipe adapts itself, which it does not say."""
    asked = {name: value for values in recipe.sections.values() for name, value in values.items()}
    return bool(asked.get("distributed_backend", "nccl") == "nccl")


def refuse_unreadable_optimizer(recipe: Recipe, args: Namespace) -> None:
    """Check that a run on devices could go on from its own checkpoints.

    Raises:
        UserError: this Python lacks what Megatron needs for it.
    """
    if problem := _unreadable_optimizer(recipe, args):
        raise UserError(f"{problem}: {_IMAGE}")


def lacking_packages(recipe: Recipe, args: Namespace) -> str | None:
    """What this Python lacks for a run on devices, as a warning; None if nothing."""
    if not is_on_devices(recipe) or has_transformer_engine():
        return None
    found = []
    if args.transformer_impl == "transformer_engine":
        found.append(
            f"{sys.executable} has no Transformer Engine, so Megatron's local layers would run, which need more memory "
            f"(megatron-fc plan ... transformer_impl=local)"
        )
    if problem := _unreadable_optimizer(recipe, args):
        found.append(f"{problem}, and pre-flight refuses it")
    return f"{'; '.join(found)}: {_IMAGE}" if found else None


def _unreadable_optimizer(recipe: Recipe, args: Namespace) -> str | None:
    sharded = args.use_distributed_optimizer and not args.use_megatron_fsdp
    saves = args.save and not args.no_save_optim
    if not (is_on_devices(recipe) and sharded and saves) or has_transformer_engine() or has_apex():
        return None
    return (
        f"use_distributed_optimizer: without Transformer Engine or Apex, which {sys.executable} lacks, Megatron cannot "
        f"read its state back, so the run could not go on from a checkpoint"
    )
