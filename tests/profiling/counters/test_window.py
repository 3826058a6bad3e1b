"""The window of steps, on a loop as Megatron's: some micro-batches forward and backward, then the optimizer."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_fc.profiling.counters.window import Window


class Events:
    """Notes what it is told, and how many losses the loop had computed by then."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.losses = 0

    def begin_counting(self) -> None:
        self.seen.append(("begin", self.losses))

    def step_counted(self) -> None:
        self.seen.append(("step", self.losses))

    def end_counting(self) -> None:
        self.seen.append(("end", self.losses))


def loop(window: Window, events: Events, steps: int, micro_batches: int = 2, again: bool = False) -> None:
    layer = torch.nn.Linear(4, 4)
    for step in range(steps):
        for _ in range(micro_batches):
            with window.forward(step) as watch_backward:
                x = torch.randn(2, 4, requires_grad=True)
                output = checkpoint(layer, x, use_reentrant=True) if again else layer(x)
                watch_backward(output)
            events.losses += 1
            output.sum().backward()


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (2, 3)])
def test_counters_are_open_for_whole_steps(first: int, steps: int) -> None:
    events = Events()
    window = Window(first, steps, events)
    loop(window, events, first + steps + 2)
    bounds = [2 * (first + step) for step in range(steps + 1)]
    assert events.seen == [("begin", bounds[0]), *(("step", at) for at in bounds[1:]), ("end", bounds[-1])]
    assert window.is_over
    assert len(window.step_seconds) == len(window.timeline) == steps


@pytest.mark.parametrize("again", [False, True], ids=["plain", "recomputed"])
def test_the_time_line_has_every_pass_once_and_in_order(again: bool) -> None:
    events = Events()
    window = Window(1, 2, events)
    loop(window, events, 4, micro_batches=3, again=again)
    for spans, seconds in zip(window.timeline, window.step_seconds, strict=True):
        assert [span.phase for span in spans] == ["forward", "backward"] * 3 + ["optimizer"]
        times = [time for span in spans for time in (span.start, span.end)]
        assert times == sorted(times)
        assert times[-1] - times[0] <= seconds


def test_a_run_that_ends_early_leaves_the_steps_that_are_complete() -> None:
    events = Events()
    window = Window(1, 5, events)
    loop(window, events, 3)
    assert events.seen == [("begin", 2), ("step", 4)]
    assert not window.is_over


def test_evaluation_and_passes_without_gradients_are_no_steps_of_backward() -> None:
    events = Events()
    window = Window(0, 1, events)
    with window.forward(0) as watch_backward, torch.no_grad():
        watch_backward(torch.ones(1))
        watch_backward((torch.ones(1),))
    loop(window, events, 2, micro_batches=1)
    assert [span.phase for span in window.timeline[0]] == ["forward", "forward", "backward", "optimizer"]
