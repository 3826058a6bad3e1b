"""The steps in which a rank counts, and the time line of these steps."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fc.profiling.records import Span


class Observer(Protocol):
    """What happens at the bounds of steps."""

    def begin_counting(self) -> None:
        """The first counted step begins."""

    def step_counted(self) -> None:
        """A counted step is complete."""

    def end_counting(self) -> None:
        """The last counted step is complete."""


class Window:
    """Tells an observer of the steps `first` to `first + steps - 1`, and times them.

    A training loop calls this rank's first forward pass of every step under `forward`; there one step ends and the next
    one begins. What a loop does before (zeroing gradients, receiving from the stage before) so counts to the step
    before: over whole steps nothing is lost and nothing doubled. It takes the beginning of one step more to end.

    Args:
        first: number of the first counted step, from 0.
        steps: how many.
        observer: told of them.

    Attributes:
        step_seconds: of the complete steps.
        timeline: of the complete steps.
    """

    def __init__(self, first: int, steps: int, observer: Observer) -> None:
        self.step_seconds: list[float] = []
        self.timeline: list[list[Span]] = []
        self._first, self._steps, self._observer = first, steps, observer
        self._current: int | None = None
        self._spans: list[Span] = []
        self._begin = 0.0

    @property
    def is_over(self) -> bool:
        return len(self.step_seconds) == self._steps

    def begin(self, step: int) -> None:
        """A step begins, which its first forward pass would say as well; the step before ends."""
        if step != self._current:
            self._current = step
            self._at_bound(step)

    @contextmanager
    def forward(self, step: int) -> Iterator[Callable[[Any], None]]:
        """Context of the forward pass of a micro-batch.

        Args:
            step: that it belongs to, from 0.

        Yields:
            What to call with the output, so that the backward pass through it is timed.
        """
        self.begin(step)
        start = time.time()
        try:
            yield self._watch_backward
        finally:
            self._note("forward", start)

    def _at_bound(self, step: int) -> None:
        if not self._first <= step <= self._first + self._steps:
            return
        if step > self._first:
            self._complete_step()
        if step == self._first:
            self._observer.begin_counting()
        elif self.is_over:
            self._observer.end_counting()
        self._begin, self._spans = time.time(), []

    def _complete_step(self) -> None:
        end = time.time()
        self.step_seconds.append(end - self._begin)
        last_pass = self._spans[-1].end if self._spans else self._begin
        self.timeline.append([*self._spans, Span("optimizer", last_pass, end)])
        self._observer.step_counted()

    def _note(self, phase: Any, start: float) -> None:
        if self._is_open():
            self._spans.append(Span(phase, start, time.time()))

    def _is_open(self) -> bool:
        return self._current is not None and self._first <= self._current < self._first + self._steps

    def _watch_backward(self, output: Any) -> None:
        if not self._is_open() or not isinstance(output, Tensor) or output.grad_fn is None:
            return

        def started(_: Any) -> None:
            start = time.time()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._note("backward", start))  # runs when this pass is complete

        output.grad_fn.register_prehook(started)
