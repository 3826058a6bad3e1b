"""The status of a run, from the files in its folder alone: quick, and without torch or Megatron.

Read are `starts.jsonl` and `state` (starts, ends and their reasons), the end of the log that has the iterations, the
arguments at the start of the TensorBoard events, and the folder of checkpoints. Any of them may be missing, be of an
older release, or end in the middle of a line.
"""

import itertools
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fc.connections.kinds import KINDS
from megatron_fc.errors import UserError
from megatron_fc.runs.arguments import read_arguments
from megatron_fc.runs.log_lines import parse_iteration, parse_validation
from megatron_fc.runs.start_record import read_events, read_state

_FILES, _FOLDERS = ("starts.jsonl", "summary.json"), ("logs", "tensorboard", "checkpoints")
_TAIL_BYTES = 1 << 18
_QUIET_SECONDS = 600.0
_LISTED = 5
_DEPTH = 3


@dataclass(frozen=True)
class Start:
    """One start of a run and how it ended.

    Attributes:
        time: when, UTC, ISO 8601.
        job: SLURM's number of the job, if there was one.
        host: its nodes.
        iteration: the last one that was done before.
        end: the reason, None while it runs or if nobody could note it.
        changed: settings that it changed of its checkpoint's, with both values.
    """

    time: str
    job: str | None
    host: str
    iteration: int
    end: str | None
    changed: dict[str, list[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its folder's iteration, whether it was finished, and how many seconds ago it last changed."""

    iteration: int
    complete: bool
    age_seconds: float


@dataclass(frozen=True)
class Run:
    """Where a run stands.

    Attributes:
        run_dir: its folder.
        connection: residual, dfc_x4 ..., None before the first start.
        state: new, running, silent (no end was noted, and nothing was written for ten minutes), ended, stuck or done.
        iteration, iterations: done and in all.
        tokens, target_tokens: the same in tokens; None where the sequence length is not known.
        tokens_per_second: over the last iterations.
        eta_seconds: of training at that speed, while it runs.
        silent_seconds: since the last sign of life.
        starts: oldest first.
        checkpoints: newest first, at most five.
        newest: iteration of the checkpoint that the next start goes on from.
        losses: of the last iterations that were logged, oldest first.
        validation: iteration and loss of the last validation.
        unreadable: lines of starts.jsonl that are torn.
    """

    run_dir: str
    connection: str | None
    state: str
    iteration: int
    iterations: int | None
    tokens: int | None
    target_tokens: int | None
    tokens_per_second: float | None
    eta_seconds: float | None
    silent_seconds: float | None
    starts: list[Start]
    checkpoints: list[Checkpoint]
    newest: int | None
    losses: list[tuple[int, float]]
    validation: tuple[int, float] | None
    unreadable: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def find_runs(folders: list[Path]) -> list[Path]:
    """Return the runs in and below folders.

    Args:
        folders: of runs, or holding such. One without any stands for a run that has not begun.

    Raises:
        UserError: a folder does not exist.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give the folder of a run, or one that holds runs")
        found += list(_runs_below(folder, _DEPTH)) or [folder]
    return list(dict.fromkeys(found))


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in _FILES) or any((folder / name).is_dir() for name in _FOLDERS):
        yield folder
    elif depth:
        for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from _runs_below(child, depth - 1)


def read_run(run_dir: Path, now: float | None = None) -> Run:
    """Read where a run stands.

    Args:
        run_dir: its folder.
        now: the time, in seconds as of `time.time`.

    Raises:
        UserError: a file cannot be read.
    """
    now = time.time() if now is None else now
    try:
        return _read_run(run_dir, now)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read_run(run_dir: Path, now: float) -> Run:
    events, unreadable = read_events(run_dir)
    starts = _starts(events)
    log, records, validation = _iterations(run_dir)
    arguments = read_arguments(run_dir)
    last = records[-1] if records else {}

    batch = int(last.get("global_batch_size", 0)) or _number(arguments, "global_batch_size")
    target = next((int(event["target_samples"]) for event in reversed(events) if event.get("target_samples")), None)
    iterations = last.get("iterations") or (target // batch if target and batch else None)
    iteration = last.get("iteration") or (events[-1].get("iteration", 0) if events else 0)
    sequence = _number(arguments, "seq_length")
    per_iteration = (batch or 0) * (sequence or 0) or None
    # A run's batch may change between its starts: samples count, where they are known.
    samples = last.get("consumed_samples", iteration * batch if batch else None)
    target = target or (iterations * batch if iterations and batch else None)
    seen = [path.stat().st_mtime for path in (log, run_dir / "starts.jsonl") if path is not None and path.exists()]
    silent = now - max(seen) if seen else None
    state = _state(run_dir, events, bool(records), iteration, iterations, silent)
    step_ms = statistics.median(record.get("step_ms", 0.0) for record in records[-20:]) if records else 0.0
    folder = _checkpoint_folder(run_dir, arguments)
    return Run(
        run_dir=str(run_dir),
        connection=_connection(arguments),
        state=state,
        iteration=iteration,
        iterations=iterations,
        tokens=int(samples) * sequence if samples is not None and sequence else None,
        target_tokens=target * sequence if target and sequence else None,
        tokens_per_second=per_iteration / step_ms * 1e3 if per_iteration and step_ms else None,
        eta_seconds=(iterations - iteration) * step_ms / 1e3 if state == "running" and iterations and step_ms else None,
        silent_seconds=silent,
        starts=starts,
        checkpoints=_checkpoints(folder, now),
        newest=_tracked(folder),
        losses=[(record["iteration"], record["loss"]) for record in records if "loss" in record][-_LISTED:],
        validation=validation,
        unreadable=unreadable,
    )


def _state(
    run_dir: Path,
    events: list[dict[str, Any]],
    logged: bool,
    iteration: int,
    iterations: int | None,
    silent: float | None,
) -> str:
    if (said := read_state(run_dir)) in ("done", "stuck"):
        return said
    if iterations and iteration >= iterations:
        return "done"
    if not events and not logged:
        return "new"
    if events and events[-1].get("event") == "end":
        return "ended"
    return "running" if silent is not None and silent < _QUIET_SECONDS else "silent"


def _starts(events: list[dict[str, Any]]) -> list[Start]:
    """Each start with the end that follows it before the next one."""
    starts = []
    for event, after in itertools.zip_longest(events, events[1:]):
        if event.get("event") != "start":
            continue
        ended = after is not None and after.get("event") == "end"
        hosts = event.get("host") or []
        starts.append(
            Start(
                time=str(event.get("time", "")),
                job=event.get("job"),
                host=hosts if isinstance(hosts, str) else " ".join(hosts),
                iteration=int(event.get("iteration") or 0),
                end=str(after.get("reason")) if ended else (None if after is None else "no end was noted"),
                changed=event.get("changed") or {},
            )
        )
    return starts


def _iterations(run_dir: Path) -> tuple[Path | None, list[dict[str, Any]], tuple[int, float] | None]:
    """The log that Megatron's iterations went to last, its last iterations, and the last validation.

    The last rank writes them, and which one that is changes with the number of nodes.
    """
    logs = sorted((run_dir / "logs").glob("rank*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for log in logs:
        lines = list(_last_lines(log))
        records = [record for record in map(parse_iteration, lines) if record]
        if records:
            validations = [record for record in map(parse_validation, lines) if record and record["loss"] is not None]
            pairs = [(record["iteration"], record["loss"]) for record in validations if record["set"] == "validation"]
            return log, records, pairs[-1] if pairs else None
    return (logs[0] if logs else None), [], None


def _last_lines(path: Path) -> Iterator[str]:
    """The whole lines at the end of a file."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").split("\n")
    yield from lines[1 if size > _TAIL_BYTES else 0 : -1]


def _number(arguments: dict[str, str], name: str) -> int | None:
    text = arguments.get(name, "")
    return int(text) if text.isdecimal() else None


def _connection(arguments: dict[str, str]) -> str | None:
    if not arguments:
        return None
    for kind, config in KINDS.items():
        slots, fractions = _number(arguments, f"{kind}_{config.slots_option}"), _number(arguments, f"{kind}_fractions")
        if slots is not None:
            options: dict[str, Any] = {config.slots_option: slots}
            options |= {} if fractions is None else {"fractions": fractions}
            dynamic = arguments.get(f"{kind}_dynamic")
            return config(**options, **({} if dynamic is None else {"dynamic": dynamic == "True"})).label
    return "residual"


def _checkpoint_folder(run_dir: Path, arguments: dict[str, str]) -> Path:
    """Beside the log, also when the run was moved; else where the run's arguments say."""
    own, said = run_dir / "checkpoints", arguments.get("save", "None")
    return own if own.exists() or said == "None" else Path(said)


def _checkpoints(folder: Path, now: float) -> list[Checkpoint]:
    found = []
    for path in folder.glob("iter_*"):
        if re.fullmatch(r"iter_\d+", path.name):
            found.append(
                Checkpoint(int(path.name[5:]), (path / ".metadata").exists(), round(now - path.stat().st_mtime, 1))
            )
    return sorted(found, key=lambda checkpoint: -checkpoint.iteration)[:_LISTED]


def _tracked(folder: Path) -> int | None:
    tracker = folder / "latest_checkpointed_iteration.txt"
    text = tracker.read_text(errors="replace").strip() if tracker.exists() else ""
    return int(text) if text.isdecimal() else None
