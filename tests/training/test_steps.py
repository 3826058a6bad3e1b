"""Bounds of steps, told from calls of forward_step and from logged lines as Megatron's loop makes them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_fc.callbacks import Callback
from megatron_fc.checkpoints.location import TRACKER
from megatron_fc.training.steps import Steps


class Told(Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def before_step(self, iteration: int) -> None:
        self.calls.append(("before", iteration))

    def after_step(self, iteration: int) -> None:
        self.calls.append(("after", iteration))

    def checkpoint_written(self, checkpoint: Path) -> None:
        self.calls.append(("written", checkpoint.name))


class Loop:
    """Megatron's loop as far as Steps sees it."""

    def __init__(self, save: Path | None = None) -> None:
        self.args, self.told = Namespace(save=save and str(save)), Told()
        self.steps = Steps(self.args, self.told)
        self._forward = self.steps.around_forward_step(lambda data, model, plan, loss=None: (data, model))

    def iteration(self, number: int, micro_batches: int = 2, logs: bool = False) -> list[tuple[str, Any]]:
        """Train it; returns what was told meanwhile."""
        self.told.calls.clear()
        self.args.curr_iteration = number
        for micro_batch in range(micro_batches):
            assert self._forward(micro_batch, "model") == (micro_batch, "model")
        if logs:
            self.steps.over(number + 1)
        return list(self.told.calls)


def test_every_step_begins_once_and_ends_before_the_next() -> None:
    loop = Loop()
    assert loop.iteration(7) == [("before", 7)], "steps before this start are another start's"
    assert loop.iteration(8) == [("after", 7), ("before", 8)]
    loop.told.calls.clear()
    loop.steps.end()
    loop.steps.end()
    assert loop.told.calls == [("after", 8)]


def test_a_logged_line_ends_a_step_at_once() -> None:
    loop = Loop()
    assert loop.iteration(0, logs=True) == [("before", 0), ("after", 0)]
    assert loop.iteration(1, logs=True) == [("before", 1), ("after", 1)]


def test_iterations_that_megatron_ran_in_a_graph_end_when_they_are_logged() -> None:
    loop = Loop()
    loop.iteration(0)
    loop.told.calls.clear()
    loop.steps.over(3)
    assert loop.told.calls == [("after", 0), ("after", 1), ("after", 2)]


def test_nothing_is_told_of_a_loop_that_trained_nothing() -> None:
    loop = Loop()
    loop.steps.over(5)
    loop.steps.end()
    assert loop.told.calls == []


@pytest.mark.parametrize("logs_here", [True, False])
def test_a_new_checkpoint_is_told_where_the_log_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs_here: bool
) -> None:
    monkeypatch.setenv("RANK", "1" if logs_here else "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / TRACKER).write_text("4")
    loop = Loop(tmp_path)
    assert loop.iteration(4) == [("before", 4)], "the one that it started from is not new"
    (tmp_path / TRACKER).write_text("5")
    written = [("written", "iter_0000005")] if logs_here else []
    assert loop.iteration(5) == [("after", 4), *written, ("before", 5)]
    (tmp_path / TRACKER).write_text("")  # being written
    assert loop.iteration(6) == [("after", 5), ("before", 6)]
    (tmp_path / TRACKER).write_text("7")
    loop.told.calls.clear()
    loop.steps.end()
    assert loop.told.calls == [("after", 6), *([("written", "iter_0000007")] if logs_here else [])]
