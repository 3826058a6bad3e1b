"""Results of runs side by side: a Markdown table beside published numbers, and grids of curves over tokens."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.evaluate.results import results_of, values_of
from megatron_fc.evaluate.task_list import TaskList
from megatron_fc.runs.metrics import Series
from megatron_fc.runs.plot import COLOURS, smoothed, told_apart
from megatron_fc.runs.writable import refuse_unwritable

_COLUMNS = 4
_DECAY, _SMOOTHED_FROM = 0.5, 10  # of curves with so many points
_SHARES = re.compile(r"acc(_.*)?|exact_match|em|f1|mc[12]|pass@.*")  # metrics that are written in percent


@dataclass(frozen=True)
class Evaluated:
    """A run.

    Attributes:
        label: its connection, and its folder where several have the same.
        results: of its checkpoints, in the order of their tokens.
    """

    label: str
    results: list[dict[str, Any]]


def read_runs(folders: Sequence[Path]) -> list[Evaluated]:
    """Read the results of runs.

    Raises:
        UserError: a folder has none.
    """
    found = [results_of(folder) for folder in folders]
    labels = told_apart([results[-1]["connection"] for results in found], folders)
    return [Evaluated(label, results) for label, results in zip(labels, found, strict=True)]


def write_report(folders: Sequence[Path], wanted: TaskList, to: Path, decay: float | None) -> list[Path]:
    """Write the table and the curves of runs, of which the first is the baseline.

    Args:
        folders: of the runs' results.
        wanted: averages and published numbers; its tasks come first.
        to: folder of results.md, tasks.png and loss.png.
        decay: of the curves' moving average over checkpoints, 0 for none; None for that of `default_decay`.

    Returns:
        The files.

    Raises:
        UserError: a folder has no results, or `to` cannot be written.
    """
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"--decay {decay}: give a number from 0 on, below 1")
    runs = read_runs(folders)
    refuse_unwritable(to)
    decay = default_decay(runs) if decay is None else decay
    written = [to / "results.md"]
    written[0].write_text(markdown(runs, wanted))
    newest = [run.results[-1] for run in runs]
    grids: tuple[tuple[str, Callable[[str], str], Callable[[dict[str, Any]], dict[str, float]]], ...] = (
        ("tasks", lambda name: _metric(name, newest, wanted), lambda results: values_of(results, wanted)),
        ("loss", lambda _: "nats per token", losses_of),
    )
    for name, metric, values in grids:
        if any(values(results) for run in runs for results in run.results):
            written.append(plot_grid(runs, values, list(wanted.tasks), to / f"{name}.png", decay, metric))
    return written


def default_decay(runs: Sequence[Evaluated]) -> float:
    """Of the moving average: none where a run has few checkpoints, so that its curve ends at the table's number."""
    return _DECAY if min(len(run.results) for run in runs) >= _SMOOTHED_FROM else 0.0


def losses_of(results: dict[str, Any]) -> dict[str, float]:
    """Losses by validation set, in nats per token."""
    return {name: float(found["value"]) for name, found in results.get("perplexity", {}).items()}


def markdown(runs: Sequence[Evaluated], wanted: TaskList) -> str:
    """Return the table of the newest checkpoints: tasks, their averages, losses; published numbers first."""
    newest = [run.results[-1] for run in runs]
    values = [values_of(results, wanted) for results in newest]
    heads = [f"paper: {name}" for name in wanted.paper]
    heads += [f"{run.label}, {results['tokens']:,} tokens" for run, results in zip(runs, newest, strict=True)]
    lines = [_row("", "metric", "shots", *heads), _row(*("---" for _ in range(3 + len(heads))))]
    for name in _names([values, list(wanted.paper.values())], list(wanted.tasks)):
        of_task = (results["tasks"][name] for results in newest if name in results.get("tasks", {}))
        task: dict[str, Any] = next(of_task, {})
        metric = _metric(name, newest, wanted)
        is_share = _is_share(name, newest, wanted)
        cells = [_number(column.get(name), is_share, {}) for column in wanted.paper.values()]
        cells += [
            _number(column.get(name), is_share, results.get("tasks", {}).get(name, {}))
            for column, results in zip(values, newest, strict=True)
        ]
        shots = task.get("shots")  # None: its tasks have different numbers
        lines.append(_row(name, metric, "" if shots is None else str(shots), *cells))
    losses = [losses_of(results) for results in newest]
    for name in _names([losses], []):
        cells = ["" for _ in wanted.paper] + [f"{column[name]:.4f}" if name in column else "" for column in losses]
        lines.append(_row(name, "loss, nats per token", "", *cells))
    limited = sorted({name for results in newest for name, task in results.get("tasks", {}).items() if task["limit"]})
    notes = "\nBehind ± the standard error, in parentheses the number of documents.\n"
    notes += f"\nA part of the documents only: {', '.join(limited)}.\n" if limited else ""
    return "\n".join(lines) + "\n" + notes


def plot_grid(
    runs: Sequence[Evaluated],
    values: Callable[[dict[str, Any]], dict[str, float]],
    first: Sequence[str],
    out: Path,
    decay: float,
    metric: Callable[[str], str],
) -> Path:
    """Draw a curve over tokens for each value and run: the points, and their moving average, corrected for its start.

    Args:
        runs: the first is the baseline, in grey.
        values: of a checkpoint's results, by name.
        first: names that come first.
        out: the PNG.
        decay: of the moving average.
        metric: what a value measures, by its name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = _names([[values(results) for run in runs for results in run.results]], first)
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    size = (3.1 * columns, 2.4 * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, name in zip(grid.flat, names, strict=False):
        for number, run in enumerate(runs):
            curve: Series = {
                results["tokens"]: found[name] for results in run.results if name in (found := values(results))
            }
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(curve.keys(), curve.values(), ".", color=colour, alpha=0.35, markersize=4)
            smooth = smoothed(curve, decay)
            axes.plot(smooth.keys(), smooth.values(), color=colour, linewidth=1.6, label=run.label)
        axes.set_title(name, fontsize=9)
        axes.set_ylabel(metric(name), fontsize=8)
        axes.grid(alpha=0.25)
        axes.locator_params(axis="x", nbins=4)  # numbers of tokens are long
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens", fontsize=9)
    grid.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"EMA {decay:g}" if decay else "", fontsize=9)
    figure.savefig(out, dpi=140)
    plt.close(figure)
    return out


def _names(groups: Sequence[Sequence[dict[str, float]]], first: Sequence[str]) -> list[str]:
    """All names, each once, those that come first before the others."""
    there = dict.fromkeys(name for columns in groups for column in columns for name in column)
    return [name for name in first if name in there] + [name for name in there if name not in first]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _metric(name: str, newest: Sequence[dict[str, Any]], wanted: TaskList) -> str:
    """What the value of a task or an average measures; nothing where only published numbers have it."""
    if name in wanted.averages:
        return "average"
    return next((results["tasks"][name]["metric"] for results in newest if name in results.get("tasks", {})), "")


def _is_share(name: str, newest: Sequence[dict[str, Any]], wanted: TaskList) -> bool:
    """A task's metric is a share, or those of all tasks of an average."""
    if name in wanted.averages:
        return all(_is_share(part, newest, wanted) for part in wanted.averages[name])
    listed = wanted.tasks[name].metric if name in wanted.tasks else None
    metric = _metric(name, newest, wanted) or listed
    return metric is None or _SHARES.fullmatch(metric) is not None


def _number(value: float | None, is_share: bool, found: dict[str, Any]) -> str:
    """A value with its standard error and its number of documents, as far as a task's result has them."""
    if value is None:
        return ""
    factor, form = (100, ".2f") if is_share else (1, ".4g")
    error, count = found.get("stderr"), found.get("documents")
    return (
        f"{factor * value:{form}}"
        + (f" ± {factor * error:{form}}" if error is not None else "")
        + (" %" if is_share else "")
        + (f" ({count:,})" if count is not None else "")
    )
