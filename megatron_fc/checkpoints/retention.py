"""Retention of checkpoints: the newest N stay, and every K-th iteration's.

Megatron's own `save_retain_interval` deletes the one before as soon as the newest is written. If that one turns out to
be damaged nothing recent is left, so here only what is older than N complete checkpoints goes.
"""

import math
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fc.callbacks import Callback
from megatron_fc.checkpoints.integrity import INDEX, is_complete, iteration_folders, step_of
from megatron_fc.checkpoints.location import newest_checkpoint
from megatron_fc.errors import UserError
from megatron_fc.runs.rank_log import is_log_rank


@dataclass(frozen=True)
class Retention:
    """A rule for the checkpoints of a run.

    Attributes:
        last: how many of the newest stay.
        every: iterations whose number it divides stay for ever; None for none.
    """

    last: int
    every: int | None = None

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Retention | None":
        """Take `keep_last` and `keep_every` out of a config's settings; None if all checkpoints stay.

        Raises:
            UserError: one is no positive number, or Megatron's own rule is set as well.
        """
        last, every = settings.pop("keep_last", None), settings.pop("keep_every", None)
        for name, value in (("keep_last", last), ("keep_every", every)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"{name}={value!r} is no number of checkpoints or iterations: set it to 1 or more")
        if last is None:
            if every is not None:
                raise UserError(f"keep_every={every} says which checkpoints stay for ever: set keep_last as well")
            return None
        if settings.get("save_retain_interval") is not None:
            raise UserError("keep_last and save_retain_interval both delete checkpoints: keep one of them")
        return cls(last, every)

    def superseded(self, folder: Path, newest: int) -> list[Path]:
        """Return what may go from a folder of checkpoints.

        Args:
            folder: of checkpoints.
            newest: iteration of the newest finished checkpoint; what is newer may be being written.
        """
        checkpoints = [path for path in iteration_folders(folder) if step_of(path) <= newest]
        complete = 0
        for at, checkpoint in enumerate(checkpoints):
            complete += is_complete(checkpoint)
            if complete == self.last:
                return [path for path in checkpoints[at + 1 :] if self.every is None or step_of(path) % self.every]
        return []


def kept_checkpoints(rule: Retention | None, steps: int, interval: int) -> tuple[int, int]:
    """How many checkpoints of a whole run the disk must hold at once.

    Args:
        rule: None if all stay.
        steps: of the run.
        interval: steps between checkpoints; the last step has one, too.

    Returns:
        The newest ones and the one that is being written; older ones that stay for ever.
    """
    written = math.ceil(steps / interval)
    if rule is None:
        return 0, written
    newest = min(1 + rule.last, written)  # most lie there while the last one is written
    return newest, (written - newest) * interval // math.lcm(interval, rule.every) if rule.every else 0


class Pruner(Callback):
    """Deletes superseded checkpoints in the background, as a parallel file system takes its time."""

    def __init__(self, retention: Retention, folder: Path) -> None:
        self._retention, self._folder = retention, folder
        self._thread: threading.Thread | None = None

    def checkpoint_written(self, checkpoint: Path) -> None:
        # What a deletion that is not over leaves behind goes with the next one.
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._delete, args=(checkpoint,), daemon=True, name="checkpoint pruner"
            )
            self._thread.start()

    def end(self) -> None:
        newest = newest_checkpoint(self._folder)
        if newest is None or not is_log_rank():
            return
        if self._thread is not None:
            self._thread.join()
        self._delete(newest)

    def _delete(self, newest: Path) -> None:
        for checkpoint in self._retention.superseded(self._folder, step_of(newest)):
            (checkpoint / INDEX).unlink(missing_ok=True)  # first: what is left of it counts as incomplete
            shutil.rmtree(checkpoint, ignore_errors=True)
            print(f"deleted {checkpoint}, {self._retention.last} newer ones are complete")
