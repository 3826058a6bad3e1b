"""`megatron-fc analyze losses`: training curves against a baseline's, how much earlier they get there, spikes."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fc.checkpoints.changes import is_model_setting
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import is_connection_argument
from megatron_fc.runs.arguments import read_arguments
from megatron_fc.runs.metrics import Metrics, Series, read_metrics
from megatron_fc.runs.plot import smoothed
from megatron_fc.runs.spikes import spikes
from megatron_fc.runs.statistics import interval
from megatron_fc.runs.status import read_run
from megatron_fc.runs.summary import RESIDUAL_GAIN

_NORMAL = 1.96  # standard deviations of a 95 % interval
_POINTS = 300  # of a curve
# Beside the model: steps of other sizes cannot stand side by side.
_STEPS = ("seq_length", "global_batch_size")


@dataclass(frozen=True)
class Earlier:
    """How many times earlier a run has the loss at which its baseline ends.

    Attributes:
        times: the baseline's last step over the run's first one at that loss; None where it does not get there.
        low, high: the same at a loss that is a 95 % interval of the curves' noise lower, or higher; None as above.
        noise: standard error of the distance of both smoothed curves from where they are without noise.
    """

    times: float | None
    low: float | None
    high: float | None
    noise: float


@dataclass(frozen=True)
class _Read:
    path: Path
    label: str
    seed: str
    metrics: Metrics
    arguments: dict[str, str]


def analyze_losses(paths: Sequence[Path], baselines: Sequence[Path], decay: float) -> dict[str, Any]:
    """Compare runs with a baseline; with several, each with that of its seed.

    Args:
        paths: folders of runs, which may still train.
        baselines: folders of runs.
        decay: of the curves' moving average, corrected for its start.

    Raises:
        UserError: a folder has no curve, a run has no baseline of its seed, or trains another model than that.
    """
    if not 0 <= decay < 1:
        raise UserError(f"--decay {decay}: give a number from 0 on, below 1")
    bases = [_read(path) for path in _distinct(baselines)]
    runs = [_read(path) for path in _distinct(paths, besides=baselines)]
    names = _names([*bases, *runs])
    described = [_described(run, None, names[run.path], decay) for run in bases]
    for run in runs:
        base = _baseline(run, bases)
        _refuse_other_model(run, base)
        described.append(_described(run, base, names[run.path], decay))
    return {"decay": decay, "runs": described, "groups": _groups(described)}


def in_words(run: Mapping[str, Any]) -> str:
    """Say how a run stands to its baseline, e.g. ``-0.0341``, or ``-0.0341 at iteration 90, where it ends``."""
    if run["difference"] is None:
        return "no iteration in common"
    early = [] if run["at"] == run["iterations"] else ["its baseline ends"]
    early = early or ([] if run["at"] == run["baseline_iterations"] else ["it ends"])
    other = f", of another seed, {run['baseline_seed']}" if run["baseline_seed"] != run["seed"] else ""
    return f"{run['difference']:+.4f}" + (f" at iteration {run['at']}, where {early[0]}" if early else "") + other


def _distinct(paths: Sequence[Path], besides: Sequence[Path] = ()) -> list[Path]:
    """Folders, each once, without some others."""
    left_out = {path.resolve() for path in besides}
    return [path for real, path in {path.resolve(): path for path in paths}.items() if real not in left_out]


def _names(runs: Sequence[_Read]) -> dict[Path, str]:
    """Of runs by their connection; by their folders, without the seed, where settings differ within a connection."""
    names = {}
    for run in runs:
        same = [other for other in runs if other.label == run.label]
        seeds, settings = [other.seed for other in same], {_varied(other) for other in same}
        is_one = len(settings) == 1 and len(set(seeds)) == len(seeds)
        names[run.path] = run.label if is_one else re.sub(r"-seed\d+", "", run.path.resolve().name)
    return names


def _varied(run: _Read) -> tuple[tuple[str, str], ...]:
    """What people vary beside the kind of connection."""
    return tuple(
        (name, value)
        for name, value in sorted(run.arguments.items())
        if is_connection_argument(name) or name in ("lr", "min_lr", "train_iters", "bf16", "fp16")
    )


def earlier(loss: Series, base: Series, decay: float) -> Earlier:
    """How much earlier a curve gets where another ends.

    The smoothed curve is at a level from its first step below until its last step above, of which the middle counts; it
    trails by decay / (1 - decay) steps, which is taken off. Even of one seed, the two are at that level in different
    steps, so what batches do to them does not cancel: the noise is that of both.
    """
    noise = math.hypot(_noise(loss, decay), _noise(base, decay))
    curve, target = smoothed(loss, decay), list(smoothed(base, decay).values())[-1]
    trails, last = decay / (1 - decay), max(base)

    def times(step: float) -> float:
        return max(1.0, last - trails) / max(1.0, step - trails)

    def first_below(level: float) -> int | None:
        return next((step for step, value in curve.items() if value <= level), None)

    def last_above(level: float) -> int | None:
        """None where it is above to the end."""
        listed = [step for step, value in curve.items() if value > level]
        return None if listed and listed[-1] == max(curve) else max(listed, default=min(curve))

    bounds = (first_below(target), last_above(target))
    early, late = first_below(target + _NORMAL * noise), last_above(target - _NORMAL * noise)
    return Earlier(
        times=None if None in bounds else times(sum(filter(None, bounds)) / 2),
        low=None if late is None else times(late),
        high=None if early is None else times(early),
        noise=noise,
    )


def _noise(series: Series, decay: float) -> float:
    """Standard error of the end of a smoothed curve, from its changes from step to step in the second half."""
    values = list(series.values())[len(series) // 2 :]
    changes = [after - before for before, after in itertools.pairwise(values)]
    return statistics.pstdev(changes) / math.sqrt(2) * math.sqrt((1 - decay) / (1 + decay)) if changes else 0.0


def _read(path: Path) -> _Read:
    metrics = read_metrics(path)
    if not metrics.loss:
        raise UserError(f"{path} has no training curve: give the folder of a run that has logged iterations")
    arguments = read_arguments(path)
    label = read_run(path).connection or path.name
    return _Read(path, label, arguments.get("seed", "?"), metrics, arguments)


def _baseline(run: _Read, bases: Sequence[_Read]) -> _Read:
    if len(bases) == 1:
        return bases[0]
    base = next((base for base in bases if base.seed == run.seed), None)
    if base is None:
        raise UserError(f"{run.path} has seed {run.seed}, and no baseline has: give one of that seed, or one for all")
    return base


def _refuse_other_model(run: _Read, base: _Read) -> None:
    for name in sorted(run.arguments.keys() & base.arguments.keys()):
        before, now = base.arguments[name], run.arguments[name]
        if before != now and (is_model_setting(name) or name in _STEPS):
            raise UserError(
                f"{run.path} and {base.path} are runs of different models, {name} is {now} in the one and {before} in "
                f"the other: compare runs that differ in their connections"
            )


def _described(run: _Read, base: _Read | None, name: str, decay: float) -> dict[str, Any]:
    metrics, curve = run.metrics, smoothed(run.metrics.loss, decay)
    gain = metrics.scalars.get(RESIDUAL_GAIN, {})
    found: dict[str, Any] = {
        "run": str(run.path),
        "name": name,
        "connection": run.label,
        "seed": run.seed,
        "iterations": max(metrics.loss),
        "loss": list(curve.values())[-1],
        "curve": _points(curve),
        "loss_spikes": spikes(metrics.loss),
        "gradient_spikes": spikes(metrics.scalars.get("grad-norm", {})),
        "residual_gain": _points(gain),
        "baseline": None,
    }
    if base is None:
        return found
    before = smoothed(base.metrics.loss, decay)
    difference = {step: value - before[step] for step, value in curve.items() if step in before}
    return found | {
        "baseline": str(base.path),
        "baseline_seed": base.seed,
        "baseline_iterations": max(base.metrics.loss),
        "at": max(difference, default=None),
        "difference": list(difference.values())[-1] if difference else None,
        "differences": _points(difference),
        "earlier": asdict(earlier(metrics.loss, base.metrics.loss, decay)),
    }


def _groups(described: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one name with several seeds that get as far as their baselines: their mean difference there."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for run in described:
        if run["baseline"] is not None and run["at"] == run["baseline_iterations"]:
            by_label.setdefault(run["name"], []).append(run)
    groups = []
    for label, runs in by_label.items():
        times = [run["earlier"]["times"] for run in runs]
        reached = [value for value in times if value is not None]
        groups.append(
            {
                "name": label,
                "seeds": [run["seed"] for run in runs],
                "difference": asdict(interval([run["difference"] for run in runs])),
                "earlier": asdict(interval(reached)) if len(reached) == len(times) else None,
            }
        )
    return groups


def _points(series: Series) -> list[list[float]]:
    """At most so many points of a curve, its last one among them."""
    listed = list(series.items())
    every = -(-len(listed) // _POINTS) or 1
    return [[step, float(f"{value:.6g}")] for step, value in listed[::-1][::every][::-1]]
