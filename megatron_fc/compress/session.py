"""A checkpoint's model outside Megatron's training loop: built, loaded, run on validation data, saved."""

import itertools
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_fc.checkpoints.errors import checkpoint_errors_named
from megatron_fc.checkpoints.modelopt_state import refuse_virtual_stages
from megatron_fc.errors import UserError
from megatron_fc.resilience.helpers import bind_helpers
from megatron_fc.training import cpu_lane
from megatron_fc.training.loaded import load_model
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.setup import silence


class Session:
    """A loaded model and the run's validation data; `session` makes one.

    Attributes:
        args: Megatron's arguments.
        chunks: this rank's model, in Megatron's precision wrapper, in a list as Megatron passes it around.
    """

    def __init__(self, args: Namespace, chunks: list[Any], operations: float) -> None:
        self.args, self.chunks, self._operations = args, chunks, operations
        self._loader: Any = None
        self._consumed = args.consumed_valid_samples

    @property
    def model(self) -> Any:
        """The model without wrappers."""
        from megatron.core.utils import unwrap_model

        return unwrap_model(self.chunks)[0]

    def prepare_validation(self, calibration_iters: int) -> int:
        """Build the data of so many validation iterations, of `eval_global_batch_size` samples each, and of more.

        Returns:
            The number of iterations behind them, `eval_iters`.
        """
        from megatron.training import training

        from megatron_fc.training.batches import datasets

        losses: int = self.args.eval_iters
        self.args.eval_iters = calibration_iters + losses
        loaders = training.build_train_valid_test_data_loaders(datasets)[1]
        self._loader = loaders[0] if loaders else None
        self.args.eval_iters = losses
        return losses

    def validate(self, start: int, iterations: int, step: Callable[[], None] = lambda: None) -> float:
        """Run the model on validation iterations `start ... start + iterations - 1` of those prepared.

        Args:
            step: called after each of this rank's micro-batches.

        Returns:
            The mean loss per token, on the ranks of the last pipeline stage; NaN on others.
        """
        from megatron.core.utils import get_model_config
        from megatron.training import training

        from megatron_fc.training.batches import forward_step

        def counted(*args: Any) -> Any:
            result = forward_step(*args)
            step()
            return result

        config = get_model_config(self.chunks[0])
        losses, _, _ = training.evaluate(counted, self.batches(start), self.chunks, None, config, eval_iters=iterations)
        return float(losses["lm loss"]) if losses else float("nan")

    def batches(self, start: int = 0) -> Iterator[Any] | None:
        """This rank's micro-batches from a validation iteration on; None on ranks that read none."""
        if self._loader is None:
            return None
        return itertools.islice(iter(self._loader), start * self.micro_batches, None)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a validation iteration on this rank."""
        args = self.args
        return int(args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size))

    def save(self, target: Path) -> None:
        """Write the model as Megatron does, without optimizer, into a folder that appears when it is complete."""
        from megatron.training.checkpointing import save_checkpoint

        staging = target.parent / f".{target.name}.incomplete"
        is_first = torch.distributed.get_rank() == 0
        if is_first:
            shutil.rmtree(staging, ignore_errors=True)
        torch.distributed.barrier()
        self.args.save = str(staging)
        self.args.consumed_valid_samples = self._consumed  # what is validated here is none of the run's progress
        try:
            with checkpoint_errors_named(self.args):
                save_checkpoint(self.args.iteration, self.chunks, None, None, self._operations)
            torch.distributed.barrier()
            if is_first:
                os.rename(staging, target)
            torch.distributed.barrier()
        finally:
            if is_first:
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def session(recipe: Recipe, checkpoint: Path, check: Callable[[Namespace], None] = lambda _: None) -> Iterator[Session]:
    """Build the recipe's model, load a checkpoint into it, and end Megatron's world afterwards; every rank calls it.

    Args:
        recipe: of the run that wrote the checkpoint.
        checkpoint: one of its folders.
        check: called with Megatron's arguments before it validates them.

    Raises:
        UserError: the checkpoint is corrupt or not that of the recipe, or the recipe cannot be run so.
    """

    def settle(args: Namespace) -> None:
        if args.full_validation or args.multiple_validation_sets:
            raise UserError("full_validation and multiple_validation_sets: unset them, eval_iters says how much is run")
        if not args.eval_iters or args.eval_iters < 1:
            raise UserError(
                f"eval_iters={args.eval_iters}: the losses need at least one validation iteration, set eval_iters=8"
            )
        check(args)
        # Cyclic data go on where the last pass over them ended, and the losses are to be of the same batches.
        args.dataloader_type = "single"

    bind_helpers()
    if cpu_lane.needed():
        cpu_lane.fork_checkpoint_helper()
    with silence():
        args, chunks, operations = load_model(recipe, checkpoint, settle)
        refuse_virtual_stages(chunks)
        yield Session(args, chunks, operations)
