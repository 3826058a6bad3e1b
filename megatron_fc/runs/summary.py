"""A finished run's summary.json and the table that compares runs."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_fc.errors import UserError
from megatron_fc.runs.metrics import Metrics, Series, read_metrics
from megatron_fc.runs.spikes import spikes

SUMMARY = "summary.json"
RESIDUAL_GAIN = "residual-gain"  # the tag of `log_residual_gain`
_PACKAGES = ("megatron_fc", "megatron-core", "torch", "triton", "transformer-engine", "numpy")
_LAST = 10


def write_summary(run_dir: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Put a run's figures and facts into `run_dir/summary.json` and return them.

    Args:
        run_dir: folder of the run; its metrics are read from there.
        facts: what the metrics do not know (label, parameters, config ...), taken over as it is; must hold
            `tokens_per_iteration`.
    """
    summary = {
        **facts,
        **figures(read_metrics(run_dir), facts["tokens_per_iteration"]),
        **surroundings(),
    }
    temporary = run_dir / f"{SUMMARY}.new"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(run_dir / SUMMARY)
    return summary


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """Return a run's summary, None if it has not finished.

    Raises:
        UserError: the file is cut or damaged.
    """
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete it and start the run again, which makes it anew") from None
    return summary


def comparison_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one column per run and the difference to the first where it means something."""
    against = "plain residuals" if summaries[0]["connection"] == "residual" else summaries[0]["connection"]
    table = Table(title=f"Connections against {against}" if len(summaries) > 1 else None)
    table.add_column("")
    for summary in summaries:
        table.add_column(summary["connection"], justify="right")
    base = summaries[0]
    for title, key, form in (
        ("training loss, last iteration", "last_loss", "loss"),
        (f"training loss, mean of last {_LAST}", "mean_last_loss", "loss"),
        ("validation loss", "validation_loss", "loss"),
        ("test loss", "test_loss", "loss"),
        ("loss spikes", "loss_spikes", "spikes"),
        ("spikes of the gradient norm", "gradient_spikes", "spikes"),
        ("largest residual gain, first", "first_residual_gain", "norm"),
        ("largest residual gain, last", "last_residual_gain", "norm"),
        ("tokens/s", "tokens_per_second", "speed"),
        ("step time", "median_step_ms", "ms"),
        ("parameters", "parameters", "count"),
        ("of these connections", "connection_parameters", "count"),
        ("peak memory", "peak_memory_bytes", "bytes"),
        ("iterations", "iterations", "count"),
    ):
        values = [summary.get(key) for summary in summaries]
        # A run without spikes is nothing to tell.
        if any(values if form == "spikes" else (value is not None for value in values)):
            table.add_row(title, *(_cell(summary, base, key, form) for summary in summaries))
    return table


def _cell(summary: dict[str, Any], base: dict[str, Any], key: str, form: str) -> str:
    value, reference = summary.get(key), base.get(key)
    if value is None:
        return "-"
    other = summary is not base and reference
    if form == "loss":
        return f"{value:.4f}" + (f" ({value - reference:+.4f})" if other else "")
    if form == "speed":
        return f"{value:,.0f}" + (f" ({value / reference:.2f}x)" if other else "")
    if form == "norm":
        return f"{value:.2f}"
    if form == "ms":
        return f"{value:,.0f} ms"
    if form == "bytes":
        return f"{value / 2**20:,.0f} MiB" + (f" ({value / reference:.2f}x)" if other else "")
    return f"{value:,}"


def surroundings() -> dict[str, Any]:
    """What a result depends on beside its config: versions, source, machine."""
    return {
        "versions": package_versions(),
        "git_commit": git_commit(),
        "machine": {"host": platform.node(), "cpus": os.cpu_count(), "system": platform.platform()},
    }


def figures(metrics: Metrics, tokens_per_iteration: int) -> dict[str, Any]:
    """A run's numbers, from what it has logged."""
    losses, step_times = list(metrics.loss.values()), list(metrics.step_seconds.values())
    # The first steps of a process allocate and warm caches up: the median is not moved by them.
    step_ms = statistics.median(step_times) * 1e3 if step_times else None
    norms, gains = metrics.scalars.get("grad-norm", {}), metrics.scalars.get(RESIDUAL_GAIN, {})
    return {
        "iterations": max(metrics.loss, default=0),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "mean_last_loss": statistics.fmean(losses[-_LAST:]) if losses else None,
        "validation_loss": _last(metrics.validation),
        "test_loss": _last(metrics.test),
        "median_step_ms": step_ms,
        "tokens_per_second": tokens_per_iteration / step_ms * 1e3 if step_ms else None,
        "loss_spikes": len(spikes(metrics.loss)),
        "gradient_spikes": len(spikes(norms)),
        "median_gradient_norm": statistics.median(norms.values()) if norms else None,
        "largest_gradient_norm": max(norms.values(), default=None),
        "first_residual_gain": gains[min(gains)] if gains else None,
        "last_residual_gain": _last(gains),
    }


def _last(series: Series) -> float | None:
    return series[max(series)] if series else None


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages on which a result depends; None for those that are not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def git_commit() -> str | None:
    """Commit of the source tree, with `-dirty` after local changes; None outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
