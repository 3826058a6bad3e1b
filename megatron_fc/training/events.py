"""TensorBoard's events: on disk after every step, and no end of the run where the disk is full."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fc.callbacks import Callback
from megatron_fc.runs.writable import failure_to_write


class EventsOnDisk(Callback):
    """Writes TensorBoard's events to disk after every step: by itself their writer does so every two minutes.

    And at the end, behind the last validation, which the summary reads.
    """

    def after_step(self, iteration: int) -> None:
        _flush_events()

    def end(self) -> None:
        _flush_events()


def _flush_events() -> None:
    from megatron.training.global_vars import get_tensorboard_writer

    if writer := get_tensorboard_writer():
        writer.flush()


class LastingWriter:
    """TensorBoard's writer as Megatron calls it; what cannot be written is left out, and said once.

    The thread that writes its file dies at the first error. When the folder takes files again, another one goes on.

    Args:
        make: makes the writer.
        folder: of its files.
    """

    def __init__(self, make: Callable[[], Any], folder: Path) -> None:
        self._make, self._folder = make, folder
        self._writer: Any = make()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if self._writer is None and name == "flush" and failure_to_write(self._folder) is None:
                self._writer = self._make()
            if self._writer is None:
                return
            try:
                getattr(self._writer, name)(*args, **kwargs)
            except OSError as error:
                self._writer = None
                print(
                    f"WARNING: {self._folder} cannot be written, {error.strerror}: the run goes on, its curves have a "
                    f"gap until there is room",
                    file=sys.__stderr__,
                    flush=True,
                )

        return call


def outlive_full_disk() -> None:
    """Let the run's writer be one that lasts; called when Megatron has made its own."""
    from megatron.training import global_vars

    if writer := global_vars._GLOBAL_TENSORBOARD_WRITER:
        folder, first = Path(writer.log_dir), [writer]

        def make() -> Any:
            return first.pop() if first else type(writer)(log_dir=str(folder), max_queue=writer.max_queue)

        global_vars._GLOBAL_TENSORBOARD_WRITER = LastingWriter(make, folder)
