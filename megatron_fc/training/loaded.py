"""A checkpoint's model outside Megatron's training loop: built and loaded, on every rank of a launcher."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fc.checkpoints.changes import refuse_other_model
from megatron_fc.checkpoints.errors import checkpoint_errors_named
from megatron_fc.checkpoints.integrity import refuse_corrupt, step_of
from megatron_fc.checkpoints.stored_tensors import is_weight
from megatron_fc.checkpoints.structure import refuse_misread_connection
from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import refuse_tokenizer_out_of_reach
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.refusal import refusals_named
from megatron_fc.training.setup import build, join_world, parse


def load_model(
    recipe: Recipe,
    checkpoint: Path,
    check: Callable[[Namespace], None] = lambda _: None,
    ready: Callable[[Namespace], Path | None] = lambda _: None,
    remedy: Callable[[Path], str] | None = None,
) -> tuple[Namespace, list[Any], float]:
    """Build a recipe's model and load a checkpoint into it; the caller ends Megatron's world (`setup.silence`).

    Args:
        recipe: of the run that wrote the checkpoint.
        checkpoint: one of its folders.
        check: called with Megatron's arguments before it validates them.
        ready: called with them once the ranks are joined, before anything is built; may return another checkpoint, for
            ranks that did not look at the same time.
        remedy: as for `load_weights`.

    Returns:
        Megatron's arguments, this rank's chunks in Megatron's precision wrapper, and the floating-point operations that
        the checkpoint counts.

    Raises:
        UserError: the checkpoint is corrupt or not that of the recipe, or the recipe cannot be run so.
    """
    from megatron.training import training
    from megatron.training.global_vars import set_global_variables

    def settle(args: Namespace) -> None:
        if args.ckpt_step is not None:
            raise UserError(
                f"ckpt_step={args.ckpt_step}: drop it, and give the checkpoint itself in place of its folder, "
                f"{checkpoint.parent}/iter_{args.ckpt_step:07d}"
            )
        check(args)
        _point_at(args, checkpoint)
        args.no_load_optim = args.no_load_rng = args.no_save_optim = args.no_save_rng = True
        args.skip_train, args.async_save, args.tensorboard_dir, args.wandb_project = True, False, None, ""

    join_world()
    args = parse(recipe, settle)
    refuse_other_model(checkpoint, args)
    refuse_misread_connection(checkpoint, recipe.connection, args.hidden_size)
    refuse_tokenizer_out_of_reach(args)
    with refusals_named("the tokenizer"):
        set_global_variables(args)
    with refusals_named("the layout"):
        training.initialize_megatron()
    checkpoint = ready(args) or checkpoint
    chunks = build(args, recipe)
    return args, chunks, load_weights(args, chunks, checkpoint, remedy)


def load_weights(
    args: Namespace, chunks: list[Any], checkpoint: Path, remedy: Callable[[Path], str] | None = None
) -> float:
    """Load a checkpoint of the same run into its model; every rank calls it.

    Args:
        args: Megatron's; its iteration and consumed samples become the checkpoint's.
        chunks: of `load_model`.
        checkpoint: a folder of the run.
        remedy: says what to do without a corrupt checkpoint, None for training's.

    Returns:
        The floating-point operations that it counts.

    Raises:
        UserError: it is corrupt, or not that of the model.
    """
    from megatron.training.checkpointing import load_checkpoint

    refuse_corrupt(checkpoint, is_weight, remedy)
    _point_at(args, checkpoint)
    # Megatron expects a run that has seen nothing yet.
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
    with checkpoint_errors_named(args):
        args.iteration, operations = load_checkpoint(chunks, None, None)
    return float(operations)


def _point_at(args: Namespace, checkpoint: Path) -> None:
    args.load = str(checkpoint.parent)
    args.ckpt_step = None if checkpoint.name == "release" else step_of(checkpoint)
