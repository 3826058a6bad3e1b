"""The progress of a job, read from its folder: the same for a terminal here and for a job on a cluster."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.progress import Progress as Bar

from megatron_fc.data.job import Job
from megatron_fc.runs.progress import clock

_PLAIN_LINE_SECONDS = 10.0
_STALE_SECONDS = 120.0


@dataclass(frozen=True)
class Status:
    """What the tasks have done so far.

    Attributes:
        tasks, done: their number, and how many are complete.
        running: of the others, those whose files have grown within two minutes.
        failures: why a task failed the last time, by its number.
        size, read: bytes of the sources as stored, and how many are read.
        documents, tokens, bad: written, and bad lines.
    """

    tasks: int
    done: int
    running: int
    failures: dict[int, str]
    size: int
    read: int
    documents: int
    tokens: int
    bad: int


class Watch:
    """Reads the status of a job again and again; records of tasks that are done are read once."""

    def __init__(self, job: Job) -> None:
        self._job, self._records = job, dict[int, dict[str, Any]]()

    def look(self) -> Status:
        job = self._job
        for path in (job.folder / "tasks").glob("[0-9]*.json"):
            if int(path.stem) not in self._records:
                self._records[int(path.stem)] = json.loads(path.read_text("utf-8"))
        done = list(self._records.values())
        sums = {
            "size": sum(source["size"] for record in done for source in record["sources"]),
            "documents": sum(made["documents"] for record in done for made in record["splits"].values()),
            "tokens": sum(made["tokens"] for record in done for made in record["splits"].values()),
            "bad": sum(sum(record["bad"].values()) for record in done),
        }
        running = 0
        for path in job.unfinished.glob("*/progress.json"):
            try:
                said, age = json.loads(path.read_text("utf-8")), time.time() - path.stat().st_mtime
            except (OSError, ValueError):  # it has just ended
                continue
            if int(path.parent.name.partition(".")[0]) not in self._records and age < _STALE_SECONDS:
                running += 1
                for name in sums:
                    sums[name] += said[name]
        failures = {
            int(path.name): path.read_text("utf-8")
            for path in (job.folder / "failed").glob("[0-9]*")
            if int(path.name) not in self._records
        }
        size = sum(source.size for source in job.sources)
        return Status(
            job.options.tasks, len(done), running, failures, size, sums["size"], *(sums[n] for n in list(sums)[1:])
        )


class Progress:
    """Shows a job that runs here: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, job: Job, stream: TextIO) -> None:
        self._watch = Watch(job)
        self._console = Console(file=stream, highlight=False)
        self._first = self._watch.look()
        self._began = self._last_line = time.monotonic()
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(BarColumn(), DownloadColumn(), TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._bar.add_task("", total=self._first.size, completed=self._first.read, text="")
            self._bar.start()

    def show(self) -> None:
        now = self._watch.look()
        text = words(now, self._first, time.monotonic() - self._began)
        if self._bar is not None:
            self._bar.update(self._task, completed=now.read, text=text)
        elif time.monotonic() - self._last_line >= _PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def words(now: Status, before: Status, seconds: float) -> str:
    """Say in a line how far a job is, how fast since `before`, and how long it will take."""
    parts = [f"{now.done:,} of {now.tasks:,} tasks", f"{now.documents:,} documents", f"{now.tokens:,} tokens"]
    if now.bad:
        parts.append(f"{now.bad:,} bad lines")
    if now.failures:
        parts.append(f"{len(now.failures):,} failed")
    read = now.read - before.read
    if seconds > 0 and read > 0:
        left = (now.size - now.read) * seconds / read
        parts += [f"{(now.tokens - before.tokens) / seconds:,.0f} tokens/s", f"{clock(left)} left"]
    return "  ".join(parts)


def status(folder: Path, seconds: float = 3.0) -> list[str]:
    """Return the lines of `megatron-fc data status`, after a look at what the job does in some seconds."""
    job = Job.read(folder)
    watch = Watch(job)
    first, began = watch.look(), time.monotonic()
    if first.running:
        time.sleep(seconds)
    now = watch.look()
    lines = [words(now, first, time.monotonic() - began)]
    lines += [f"task {task} failed: {said}" for task, said in sorted(now.failures.items())]
    if job.manifest.exists():
        lines.append(f"complete: {job.manifest}")
    elif not now.running:
        lines.append(
            "nothing runs: the same `megatron-fc data tokenize` goes on, unless SLURM has jobs of it in its queue"
        )
    return lines
