"""A run's progress on the terminal: a bar where there is one, plain lines elsewhere."""

import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_PLAIN_LINE_SECONDS = 5.0


class ProgressDisplay:
    """Shows iterations and validations as they are logged.

    Args:
        stream: the real standard output.
        label: name of the run, e.g. ``dfc_x4``.
        tokens_per_iteration: global batch size times sequence length.
    """

    def __init__(self, stream: TextIO, label: str, tokens_per_iteration: int) -> None:
        self._label, self._tokens = label, tokens_per_iteration
        self._console = Console(file=stream, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def iteration(self, record: dict[str, Any]) -> None:
        """Show one iteration record (`megatron_fc.runs.log_lines`)."""
        done, total, step_ms = record["iteration"], record["iterations"], record.get("step_ms", 0.0)
        loss, rate = record.get("loss", float("nan")), self._tokens / max(step_ms, 1e-9) * 1e3
        left = clock((total - done) * step_ms / 1e3)
        if self._console.is_terminal:
            self._show_bar(done, total, f"loss {loss:.4f}  {rate:,.0f} tokens/s  {left} left")
            return
        now = time.monotonic()
        if done == total or now - self._last_line >= _PLAIN_LINE_SECONDS:
            self._last_line = now
            self.say(f"{self._label}  iteration {done}/{total}  loss {loss:.4f}  {rate:,.0f} tokens/s  {left} left")

    def validation(self, record: dict[str, Any]) -> None:
        """Show one validation record."""
        self.say(f"{self._label}  iteration {record['iteration']}  {record['set']} loss {record['loss']:.4f}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        (self._bar.console if self._bar else self._console).print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn(self._label),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                # By default the bar takes standard output over, which is the log's.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=total, text=text)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, text=text)


def clock(seconds: float) -> str:
    """Return e.g. 2:05, or 1:02:05 with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
