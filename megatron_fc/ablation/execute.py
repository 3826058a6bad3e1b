"""Starts the runs of a suite that are left, so many at a time, each a `megatron-fc train` of its own.

What has a record is never run again; what was killed goes on from its own checkpoint. The runs end with the process
that started them, also when that is killed, so that none trains on into a folder which the next start takes over.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fc.ablation.planned import Planned
from megatron_fc.ablation.record import finished, read_record, record_diverged, record_finished
from megatron_fc.ablation.suite import Suite
from megatron_fc.resilience.helpers import end_with
from megatron_fc.resilience.rejected_results import REPEAT_ELSEWHERE, WRONG
from megatron_fc.runs.start_record import read_events, read_state

_LOOK_SECONDS = 0.2


@dataclass
class _Started:
    planned: Planned
    process: subprocess.Popen[bytes]
    place: int
    began: float


def left(suite: Suite, planned: Sequence[Planned], results: Path, *, record: bool = True) -> list[Planned]:
    """Return the runs without a record; what has finished, or diverged on SLURM, gets its record here.

    Args:
        suite: theirs.
        planned: all runs.
        results: folder of their records.
        record: False for a dry run: what would get a record is left out, and nothing is written.

    Raises:
        UserError: a record or a folder is of other settings or data.
    """
    remaining = []
    for one in planned:
        if read_record(results, one) is not None:
            continue
        write = record_finished if finished(suite, one) else record_diverged if _has_diverged(one) else None
        if write is None:
            remaining.append(one)
        elif record:
            write(suite, results, one)
    return remaining


def diverged(planned: Sequence[Planned], results: Path) -> list[str]:
    """Return the names of the runs that count as diverged, by their record or as the launch scripts gave them up."""
    records = ((one, read_record(results, one)) for one in planned)
    return [one.run.name for one, found in records if (_has_diverged(one) if found is None else found["diverged"])]


def _has_diverged(planned: Planned) -> bool:
    """Whether the launch scripts gave the run up after a loss that is not finite."""
    events, _ = read_events(planned.run_dir)
    return (
        read_state(planned.run_dir) == "stuck"
        and bool(events)
        and events[-1].get("exit_code") in (REPEAT_ELSEWHERE, WRONG)
    )


def default_jobs() -> int:
    """A run for each GPU, else one."""
    return max(1, torch.cuda.device_count())


def execute(
    suite: Suite, planned: Sequence[Planned], results: Path, jobs: int, report: Callable[[str], None]
) -> list[str]:
    """Run what is left.

    Args:
        suite: theirs.
        planned: all runs.
        results: folder of their records.
        jobs: runs at a time.
        report: told of every begin and end.

    Returns:
        The names of those that failed; the others have a record.

    Raises:
        UserError: as `left`.
    """
    waiting, failed = left(suite, planned, results), []
    done = len(planned) - len(waiting)
    places, running = list(range(jobs)), list[_Started]()
    try:
        while waiting or running:
            while waiting and places:
                running.append(_start(suite, waiting.pop(0), places.pop(0), jobs))
                report(f"{running[-1].planned.run.name} begins, {done} of {len(planned)} are done")
            ended = [started for started in running if started.process.poll() is not None]
            for started in ended:
                running.remove(started)
                places.append(started.place)
                record = _record(suite, results, started)
                if record is None:
                    failed.append(started.planned.run.name)
                    report(f"{failed[-1]} failed with code {started.process.returncode}: {_last_words(started)}")
                    continue
                done += 1
                _drop_checkpoints(suite, started.planned)
                report(f"{started.planned.run.name} {_outcome(record)}, {time.monotonic() - started.began:.0f} s")
            if not ended:
                time.sleep(_LOOK_SECONDS)
    finally:
        for started in running:
            started.process.terminate()  # it saves
        for started in running:
            started.process.wait()
    return failed


def _start(suite: Suite, planned: Planned, place: int, jobs: int) -> _Started:
    planned.run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_fc", "train", str(suite.config), *planned.words, "--brief"]
    with open(_log(planned), "ab") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | _place(place, jobs),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(end_with, os.getpid()),
        )
    return _Started(planned, process, place, time.monotonic())


def _place(place: int, jobs: int) -> dict[str, str]:
    """A GPU of its own, or its share of the processors."""
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[place % count]}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}


def _log(planned: Planned) -> Path:
    return planned.run_dir / "ablate.log"


def _record(suite: Suite, results: Path, started: _Started) -> dict[str, Any] | None:
    if started.process.returncode in (REPEAT_ELSEWHERE, WRONG):
        return record_diverged(suite, results, started.planned)
    return None if started.process.returncode else record_finished(suite, results, started.planned)


def _outcome(record: dict[str, Any]) -> str:
    if record["diverged"]:
        return f"diverged after iteration {record['iterations']}"
    if record["validation_loss"] is None:
        return f"is done, training loss {record['mean_last_loss']:.4f}"
    return f"is done, validation loss {record['validation_loss']:.4f}"


def _last_words(started: _Started) -> str:
    lines = [line for line in _log(started.planned).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"see {started.planned.run_dir}"


def _drop_checkpoints(suite: Suite, planned: Planned) -> None:
    if suite.keep_checkpoints_of is not None and planned.run.seed not in suite.keep_checkpoints_of:
        shutil.rmtree(planned.run_dir / "checkpoints", ignore_errors=True)
