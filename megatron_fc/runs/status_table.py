"""`megatron-fc runs`: one line per run; of a single run also its starts, checkpoints and losses."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fc.runs.status import Run, find_runs, read_run

_PIPE_WIDTH = 160
_COLOURS = {"running": "green", "done": "cyan", "ended": "yellow", "silent": "red", "stuck": "red", "new": "dim"}


def main(folders: list[Path], as_json: bool) -> int:
    """Print where runs stand; returns the exit code.

    Args:
        folders: of runs, or holding such.
        as_json: print a JSON list instead of a table.

    Raises:
        UserError: a folder does not exist, or a file in it cannot be read.
    """
    runs = [read_run(run_dir) for run_dir in find_runs(folders)]
    if as_json:
        print(json.dumps([run.to_dict() for run in runs], indent=2))
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    console.print(_table(runs))
    if len(runs) == 1:
        for line in _details(runs[0]):
            console.print(line, markup=False, soft_wrap=True)
    return 0


def _table(runs: list[Run]) -> Table:
    table = Table()
    for title in ("run", "state", "tokens", "done", "tokens/s", "left", "starts", "loss", "checkpoint"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=title != "run")
    for run in runs:
        table.add_row(
            run.run_dir,
            f"[{_COLOURS[run.state]}]{run.state}[/]",
            _short(run.tokens),
            f"{done:.1%}" if (done := _done(run)) is not None else "-",
            f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "-",
            _duration(run.eta_seconds),
            str(len(run.starts)) if run.starts else "-",
            f"{run.losses[-1][1]:.4f}" if run.losses else "-",
            str(run.newest) if run.newest is not None else "-",
        )
    return table


def _done(run: Run) -> float | None:
    """The part that is trained; of its tokens where they are known, as steps may have had several sizes."""
    if run.tokens is not None and run.target_tokens:
        return run.tokens / run.target_tokens
    return run.iteration / run.iterations if run.iterations else None


def _details(run: Run) -> Iterator[str]:
    if run.connection:
        yield f"connection   {run.connection}"
    if run.iterations:
        tokens = f", {run.tokens:,} of {run.target_tokens:,} tokens" if run.tokens and run.target_tokens else ""
        yield f"progress     iteration {run.iteration:,} of {run.iterations:,}{tokens}"
    if run.silent_seconds is not None and run.state != "done":
        yield f"last sign    {_duration(run.silent_seconds)} ago"
    for number, start in enumerate(run.starts):
        end = start.end or ("runs" if run.state == "running" else "no end was noted")
        job = f"job {start.job}, " if start.job else ""
        title = "starts" if number == 0 else ""
        yield f"{title:<12} {start.time}  {job}{start.host}, from iteration {start.iteration}: {end}"
        if start.changed:
            listed = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in start.changed.items())
            yield f"{'':<12} there changed {listed}"
    if len(run.starts) > 1:
        reasons = Counter(start.end or "no end was noted" for start in run.starts[:-1])
        listed = ", ".join(f"{reason} ({count})" if count > 1 else reason for reason, count in reasons.items())
        yield f"restarts     {len(run.starts) - 1}: {listed}"
    if run.unreadable:
        yield f"note         {run.unreadable} torn lines in starts.jsonl were left out"
    for number, checkpoint in enumerate(run.checkpoints):
        title = "checkpoints" if number == 0 else ""
        mark = ", the next start goes on from it" if checkpoint.iteration == run.newest else ""
        mark += "" if checkpoint.complete else ", not finished"
        yield f"{title:<12} iteration {checkpoint.iteration}, {_duration(checkpoint.age_seconds)} ago{mark}"
    if run.losses:
        yield "losses       " + "  ".join(f"{iteration}: {loss:.4f}" for iteration, loss in run.losses)
    if run.validation:
        yield f"validation   {run.validation[0]}: {run.validation[1]:.4f}"


def _short(tokens: int | None) -> str:
    if tokens is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:.3f}{unit}"
    return f"{tokens:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
