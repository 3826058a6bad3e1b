"""Two callbacks of every run that belong to Megatron's loop alone."""

from argparse import Namespace

from megatron_fc.callbacks import Callback
from megatron_fc.checkpoints.location import checkpoint_errors_named


class CheckpointErrors(Callback):
    """Turns what Megatron raises while it loads or writes a checkpoint into one sentence."""

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def failed(self, error: BaseException) -> BaseException:
        try:
            with checkpoint_errors_named(self._args):
                raise error
        except BaseException as named:
            return named


class EventsOnDisk(Callback):
    """Writes TensorBoard's events to disk after every step: by itself their writer does so every two minutes."""

    def after_step(self, iteration: int) -> None:
        from megatron.training.global_vars import get_tensorboard_writer

        if writer := get_tensorboard_writer():
            writer.flush()
