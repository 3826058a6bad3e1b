"""`megatron-fc upcycle`: a checkpoint in, a checkpoint out, nothing else written."""

from datetime import timedelta
from pathlib import Path

import torch

from megatron_fc.checkpoints.integrity import refuse_corrupt
from megatron_fc.checkpoints.location import find_checkpoint, refuse_existing
from megatron_fc.checkpoints.modelopt_state import refuse_state
from megatron_fc.checkpoints.upcycle import refuse_connected, to_residual, upcycle
from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import refuse_tokenizer_out_of_reach
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.setup import build, join_world, parse, silence

_QUANTIZE_LAST = "convert the checkpoint that it was made of, and quantise the result"


def upcycle_checkpoint(recipe: Recipe, source: Path, target: Path) -> str:
    """Write the plain checkpoint below `source` with the recipe's connections to `target`; returns what was done.

    Every rank of a launcher calls it, a lone process is a world of one.

    Raises:
        UserError: the checkpoint is not that of this model without connections, or `target` exists.
    """
    from megatron.training import training
    from megatron.training.global_vars import set_global_variables

    if recipe.connection is None:
        raise UserError("connection=residual: set the connections of the new checkpoint, e.g. connection=dfc rate=4")
    recipe.connection.refuse_residual_start()
    checkpoint = find_checkpoint(source)
    refuse_state(checkpoint, _QUANTIZE_LAST)
    refuse_connected(checkpoint)
    refuse_existing(target)
    with silence():
        join_world()
        args = parse(recipe)
        args.tensorboard_dir = None
        args.wandb_project = ""
        refuse_tokenizer_out_of_reach(args)
        set_global_variables(args)
        training.initialize_megatron()
        refuse_corrupt(checkpoint)
        return upcycle(
            build(args, recipe), checkpoint, target, recipe.connection, with_optimizer=not args.no_load_optim
        )


def residual_checkpoint(source: Path, target: Path) -> str:
    """Write the checkpoint below `source` without its connections to `target`; returns what was done.

    Raises:
        UserError: its connections are not at the identity, or `target` exists.
    """
    checkpoint = find_checkpoint(source)
    refuse_state(checkpoint, _QUANTIZE_LAST)
    refuse_existing(target)
    with silence():
        join_world()
        # The files are Megatron's, for which a world has to exist; its tensors stay on the CPU.
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=10))
        refuse_corrupt(checkpoint)
        return to_residual(checkpoint, target)
