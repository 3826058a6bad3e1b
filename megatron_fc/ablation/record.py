"""The small file that is kept of a finished run: enough for the tables, and to go on from on another machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fc.ablation.planned import Planned, digest_of
from megatron_fc.ablation.suite import Suite
from megatron_fc.errors import UserError
from megatron_fc.planning import memory
from megatron_fc.preflight.estimate import shape_of, training_of
from megatron_fc.preflight.validation import validate
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.runs.plot import smoothed
from megatron_fc.runs.summary import figures, read_summary, surroundings

_OF_SUMMARY = (
    "connection",
    "iterations",
    "tokens",
    "first_loss",
    "last_loss",
    "mean_last_loss",
    "validation_loss",
    "loss_spikes",
    "gradient_spikes",
    "median_gradient_norm",
    "largest_gradient_norm",
    "first_residual_gain",
    "last_residual_gain",
    "tokens_per_second",
    "parameters",
    "connection_parameters",
    "peak_memory_bytes",
    "seconds",
    "world_size",
    "backend",
    "versions",
    "git_commit",
    "machine",
)
_OF_RUN = ("variant", "seed", "copy", "settings", "diverged", "saved_bytes")
CURVE_DECAY, CURVE_POINTS = 0.95, 60


def record_file(results: Path, planned: Planned) -> Path:
    """Where a run's record lies in the folder of a suite's results."""
    return results / f"{planned.run.name}.json"


def read_record(results: Path, planned: Planned) -> dict[str, Any] | None:
    """Return the record of a run, None if there is none.

    Raises:
        UserError: it is of other settings or data.
    """
    file = record_file(results, planned)
    if not file.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        found = record["digest"], record["data"]
        _ = [record[name] for name in (*_OF_RUN, *_OF_SUMMARY)]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no record of a run: delete it, and the run is done again") from None
    for what, there, here in zip(("settings", "data"), found, (planned.digest, planned.data), strict=True):
        if there != here:
            said = _said(record["settings"], planned.words) if what == "settings" else ""
            raise UserError(
                f"{file} is of a run with other {what}{said}: give another --results and --out, or delete it to run it "
                f"again"
            )
    return record


def _said(there: Sequence[str], here: Sequence[str]) -> str:
    """Words of settings that differ; those of the config's file are not in a record."""
    changed = [word for word in there if word not in here]
    return f", {' '.join(changed)} among them" if changed else " in the config or on the command line"


def finished(suite: Suite, planned: Planned) -> dict[str, Any] | None:
    """Return the summary in a run's folder, None where the run has not finished.

    Raises:
        UserError: the folder's run has other settings.
    """
    summary = read_summary(planned.run_dir)
    if summary is not None and digest_of(summary["config"]) != planned.digest:
        raise UserError(
            f"{planned.run_dir} holds a run with other settings than {planned.run.name} of {suite.file}: remove it, or "
            f"give another --out"
        )
    return summary


def record_finished(suite: Suite, results: Path, planned: Planned) -> dict[str, Any] | None:
    """Write the record of a run that has `finished`; returns it, None where it has not.

    Raises:
        UserError: as `finished`.
    """
    summary = finished(suite, planned)
    return None if summary is None else _write(suite, results, planned, summary)


def record_diverged(suite: Suite, results: Path, planned: Planned) -> dict[str, Any]:
    """Write the record of a run that ended in a loss which is not finite, and return it: it is not run again."""
    found = figures(read_metrics(planned.run_dir), 0)
    # What it reached before says nothing of what it was to reach.
    facts = {name: found[name] for name in ("iterations", "loss_spikes", "gradient_spikes", "largest_gradient_norm")}
    return _write(suite, results, planned, facts | surroundings(), diverged=True)


def _write(
    suite: Suite, results: Path, planned: Planned, facts: dict[str, Any], diverged: bool = False
) -> dict[str, Any]:
    record = {
        "suite": suite.name,
        "variant": planned.run.variant,
        "seed": planned.run.seed,
        "copy": planned.run.copy,
        "digest": planned.digest,
        "data": planned.data,
        "settings": suite.settings_of(planned.run),
        "diverged": diverged,
        **{name: facts.get(name) for name in _OF_SUMMARY},
        "saved_bytes": _saved_bytes(suite, planned),
        "curve": _curve(planned.run_dir),
    }
    file = record_file(results, planned)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(file)
    return record


def _curve(run_dir: Path) -> list[list[float]]:
    """Training loss by iteration, its moving average at some points: the last one is among them."""
    smooth: Sequence[tuple[int, float]] = list(smoothed(read_metrics(run_dir).loss, CURVE_DECAY).items())
    step = -(-len(smooth) // CURVE_POINTS) or 1
    return [[iteration, round(loss, 5)] for iteration, loss in smooth[::-1][::step][::-1]]


def _saved_bytes(suite: Suite, planned: Planned) -> float | None:
    """Bytes that connections keep for backward per token and layer, more than plain residuals, as `plan` estimates.

    None where it does not count something in the config.
    """
    try:
        # The vocabulary, which only the tokenizer knows, is no matter of connections.
        run = validate(suite.config, ["vocab_size=1024", *planned.words], nodes=1, gpus_per_node=1)
        shape, training = shape_of(run), training_of(run)
    except UserError:
        return None
    tokens = run.layout.micro_batch * shape.sequence
    return memory.worst_stage(shape, training, run.layout).connection_activations / tokens / shape.layers
