"""Disk space that a run's checkpoints need where they lie: what they still need soon, and what the whole run does."""

from argparse import Namespace
from pathlib import Path

from megatron_fc.checkpoints.integrity import intact_checkpoints
from megatron_fc.errors import UserError
from megatron_fc.planning.memory import checkpoint_bytes
from megatron_fc.preflight.estimate import kept_of, shape_of, training_of
from megatron_fc.preflight.nodes import DiskSpace
from megatron_fc.preflight.validation import Validated, layout_of, set_padded_vocabulary
from megatron_fc.training.recipe import Recipe


def disk_space_of(recipe: Recipe, args: Namespace) -> DiskSpace | None:
    """Return what a run needs, None if it saves nothing.

    Args:
        recipe: the run.
        args: its arguments, validated by Megatron.
    """
    if not args.save:
        return None
    there = intact_checkpoints(Path(args.save))
    size = _size_of(there[0]) if there else _expected_size(recipe, args)
    at_once = 1 + (recipe.retention.last if recipe.retention else 1)  # one more while the next is written
    return DiskSpace(Path(args.save), size, max(1, at_once - len(there)), kept_of(recipe, args))


def _size_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


def _expected_size(recipe: Recipe, args: Namespace) -> int | None:
    """By planning; None for what it does not count."""
    set_padded_vocabulary(args)
    try:
        run = Validated(recipe, args, layout_of(args, 1, args.world_size), [])
        weights, whole = checkpoint_bytes(shape_of(run), training_of(run))
    except UserError:
        return None
    return int(weights if args.no_save_optim else whole)
