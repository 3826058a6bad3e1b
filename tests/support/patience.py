"""Waiting in tests: an event ends it. The clock only ends what hangs, however slow and busy the machine is."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from megatron_fc.runs.metrics import read_metrics

PATIENCE = 900.0  # seconds


def wait_until[T](condition: Callable[[], T], what: Callable[[], str] | str) -> T:
    """Wait for a true value and return it.

    Args:
        condition: asked again and again; raises if the wait is in vain.
        what: what is waited for, or how to find out what there is to see when it never comes.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        asked = time.monotonic()
        if value := condition():
            return value
        now = time.monotonic()
        assert now < deadline, f"waited {PATIENCE:.0f} s for {what if isinstance(what, str) else what()}"
        time.sleep(min(max(0.2, 4 * (now - asked)), 2.0))  # what is tested needs the machine


def wait_for_iteration(run_dir: Path, iteration: int, *processes: subprocess.Popen) -> int:
    """Wait until a run, none of whose processes ends before, has logged an iteration; returns its last one.

    Args:
        run_dir: of the run.
        iteration: at least this one.
        processes: those that train.
    """

    def reached() -> int:
        for process in processes:
            said = process.stdout.read() if process.poll() is not None and process.stdout else ""
            assert process.poll() is None, f"{process.args} ended before iteration {iteration}: {said}"
        last = max(read_metrics(run_dir).loss, default=0)
        return last if last >= iteration else 0

    return wait_until(reached, f"iteration {iteration} of {run_dir}")
