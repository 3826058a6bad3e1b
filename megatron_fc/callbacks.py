"""Callbacks: what goes along with a training run, and when it is asked.

`megatron_fc.training.loop.train` takes a list of them. They compose: each sees what those before it in the list have
made of the model and of the forward step. Every rank has its own.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_fc.megatron.parameter_count import ParameterCount

# (data iterator, model, return_schedule_plan=False, loss=...) -> the output, and the function that makes a loss of it.
ForwardStep = Callable[..., tuple[Any, Any]]


class Callback:
    """Goes along with a run. This one does nothing; others override what they need."""

    def arguments_valid(self, args: Namespace) -> None:
        """Called when Megatron has validated the arguments, before anything is written.

        Raises:
            UserError: the run cannot be accompanied.
        """

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        """Called when Megatron has joined the ranks and built this rank's chunks; returns those to train."""
        return chunks

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        """Return what runs a micro-batch, of training or validation, in place of `forward_step`."""
        return forward_step

    def before_step(self, iteration: int) -> None:
        """Called before this rank's first micro-batch of an iteration, counted from 0."""

    def after_step(self, iteration: int) -> None:
        """Called once an iteration is over, at the latest before the next one begins; no collective may be called.

        On the rank that logs, when its line is logged. Where CUDA graphs hold whole iterations, on no other.
        """

    def checkpoint_written(self, checkpoint: Path) -> None:
        """Called on the rank that logs, after the first step that finds a new checkpoint complete."""

    def end(self) -> None:
        """Called when Megatron's loop has ended, before the ranks part; the last callback of the list first."""

    def failed(self, error: BaseException) -> BaseException:
        """Called in place of `end` when an error, or Megatron itself, ends the run; returns what is raised."""
        return error

    def advice(self) -> str | None:
        """Called when another rank is lost or hangs; returns what to do then, None for what is usual."""
        return None


class Callbacks(Callback):
    """A list of callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def arguments_valid(self, args: Namespace) -> None:
        for callback in self._callbacks:
            callback.arguments_valid(args)

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        for callback in self._callbacks:
            chunks = callback.model_built(args, chunks, parameters)
        return chunks

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        for callback in self._callbacks:
            forward_step = callback.around_forward_step(forward_step)
        return forward_step

    def before_step(self, iteration: int) -> None:
        for callback in self._callbacks:
            callback.before_step(iteration)

    def after_step(self, iteration: int) -> None:
        for callback in self._callbacks:
            callback.after_step(iteration)

    def checkpoint_written(self, checkpoint: Path) -> None:
        for callback in self._callbacks:
            callback.checkpoint_written(checkpoint)

    def end(self) -> None:
        for callback in reversed(self._callbacks):
            callback.end()

    def failed(self, error: BaseException) -> BaseException:
        for callback in self._callbacks:
            error = callback.failed(error)
        return error

    def advice(self) -> str | None:
        return next(filter(None, (callback.advice() for callback in self._callbacks)), None)
