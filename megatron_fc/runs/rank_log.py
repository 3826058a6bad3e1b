"""Megatron's output goes to a log file per rank; the lines that matter go on to the display."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from megatron_fc.runs.log_lines import parse_iteration, parse_validation
from megatron_fc.runs.progress import ProgressDisplay


class _Log(io.TextIOBase):
    """A log file; that it can no longer be written is said once, and does not end the run."""

    def __init__(self, path: Path) -> None:
        self.path, self._has_failed = path, False
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by `close`)

    def write(self, text: str) -> int:
        with self._failure_said():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failure_said():
            self._file.flush()

    def close(self) -> None:
        with self._failure_said():
            self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    @contextlib.contextmanager
    def _failure_said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed and sys.__stderr__ is not None:
                print(f"WARNING: {self.path} cannot be written, {error.strerror}", file=sys.__stderr__, flush=True)
            self._has_failed = True


class _Tee(io.TextIOBase):
    """Writes into the log and hands every whole line to `on_line`."""

    def __init__(self, log: _Log, on_line: Callable[[str], None]) -> None:
        self._log, self._on_line, self._pending = log, on_line, ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._on_line(line)
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def fileno(self) -> int:
        return self._log.fileno()


@contextlib.contextmanager
def run_log(
    run_dir: Path, rank: int, display: ProgressDisplay | None, on_iteration: Callable[[int], None]
) -> Iterator[Path]:
    """Redirect Python's standard output, error and logging into `run_dir/logs/rank<N>.log` while the body runs.

    Args:
        run_dir: folder of the run; created if needed.
        rank: global rank of this process.
        display: where iterations and validations are shown, on the rank that logs them; None elsewhere.
        on_iteration: told, where an iteration is logged, how many are over.

    Yields:
        The path of the log.
    """
    log_path = run_dir / "logs" / f"rank{rank}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with _Log(log_path) as log:

        def on_line(line: str) -> None:
            if display is None:
                return
            if record := parse_iteration(line):
                display.iteration(record)
                on_iteration(record["iteration"])
            elif record := parse_validation(line):
                display.validation(record)

        with contextlib.redirect_stdout(_Tee(log, on_line)), contextlib.redirect_stderr(log), _logging_into(log):
            try:
                yield log_path
            finally:
                if display is not None:
                    display.close()


@contextlib.contextmanager
def _logging_into(stream: _Log) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:  # the stream is closed next
        root.handlers[:] = handlers
        root.setLevel(level)


def real_stdout() -> TextIO:
    """The process's standard output, whatever it is redirected to."""
    assert sys.__stdout__ is not None
    return sys.__stdout__


def is_log_rank() -> bool:
    """True on the last rank, which is where Megatron logs."""
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
