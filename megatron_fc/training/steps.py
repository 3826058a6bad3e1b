"""The bounds of steps in Megatron's loop, told to callbacks.

Megatron's loop has no hooks of its own, and is not patched. What it shows of a step are its calls of `forward_step`,
and the line that the logging rank prints.
"""

import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_fc.callbacks import Callback, ForwardStep
from megatron_fc.checkpoints.location import newest_checkpoint
from megatron_fc.runs.rank_log import is_log_rank


class Steps:
    """Calls `before_step`, `after_step` and `checkpoint_written`.

    Args:
        args: Megatron's arguments, which count the iterations.
        callbacks: told of them.
    """

    def __init__(self, args: Namespace, callbacks: Callback) -> None:
        self._args, self._callbacks = args, callbacks
        self._current: int | None = None  # begun last
        self._ended = 0  # the iterations before are over
        self._saves = Path(args.save) if args.save and is_log_rank() else None
        self._newest = newest_checkpoint(self._saves) if self._saves else None

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        """Return what Megatron calls for a micro-batch: every callback's, with the bounds of steps noticed."""
        run = self._callbacks.around_forward_step(forward_step)

        @functools.wraps(forward_step)
        def step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
            self._begin(self._args.curr_iteration)
            return run(data_iterator, model, return_schedule_plan)

        return step

    def over(self, count: int) -> None:
        """The first `count` iterations of the run are over, those of earlier starts included."""
        if self._current is None:
            return
        for iteration in range(self._ended, count):
            self._callbacks.after_step(iteration)
        self._ended = max(self._ended, count)
        self._look_for_checkpoint()

    def end(self) -> None:
        """Megatron's loop has ended by itself."""
        if self._current is not None:
            self.over(self._current + 1)

    def _begin(self, iteration: int) -> None:
        if iteration == self._current:
            return
        if self._current is None:
            self._ended = iteration
        self._current = iteration
        self.over(iteration)
        self._callbacks.before_step(iteration)

    def _look_for_checkpoint(self) -> None:
        newest = newest_checkpoint(self._saves) if self._saves else None
        if newest is not None and newest != self._newest:
            self._newest = newest
            self._callbacks.checkpoint_written(newest)
