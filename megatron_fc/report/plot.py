"""Training curves as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fc.report.runlog import read_metrics

# Colour-blind safe (Okabe-Ito), the baseline in grey.
_COLOURS = ("#666666", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")


def ema(values: Sequence[float], decay: float) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    smooth, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        smooth.append(average / (1 - decay**count))
    return smooth


def plot_losses(runs: Sequence[tuple[str, Path]], out: Path, decay: float = 0.9) -> Path:
    """Draw the training curves of runs, raw and smoothed, and the difference of the smoothed ones to the first.

    Args:
        runs: label and folder of each run; the first is the baseline.
        out: the PNG.
        decay: of the moving average; 0.999 in the paper's figures, which have a thousand times more steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {label: _curve(run_dir) for label, run_dir in runs}
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    base = dict(zip(*_smoothed(curves[runs[0][0]], decay), strict=True))
    for colour, (label, (steps, losses)) in zip(_COLOURS * len(runs), curves.items(), strict=False):
        top.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        _, smooth = _smoothed((steps, losses), decay)
        top.plot(steps, smooth, color=colour, linewidth=1.8, label=f"{label}: EMA {smooth[-1]:.3f}")
        shared = [(step, value - base[step]) for step, value in zip(steps, smooth, strict=True) if step in base]
        bottom.plot(*zip(*shared, strict=True), color=colour, linewidth=1.5)
    top.set(ylabel="training loss", title=f"Training loss, raw and EMA {decay:g}")
    top.legend(frameon=False)
    bottom.set(xlabel="iteration", ylabel=f"EMA minus\n{runs[0][0]}")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    plt.close(figure)
    return out


def _curve(run_dir: Path) -> tuple[list[int], list[float]]:
    records: list[dict[str, Any]] = [r for r in read_metrics(run_dir) if r["kind"] == "iteration" and "loss" in r]
    return [r["iteration"] for r in records], [r["loss"] for r in records]


def _smoothed(curve: tuple[list[int], list[float]], decay: float) -> tuple[list[int], list[float]]:
    return curve[0], ema(curve[1], decay)
