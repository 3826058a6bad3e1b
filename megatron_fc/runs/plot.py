"""Training curves as a PNG."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_fc.runs.metrics import Series, read_metrics

# Colour-blind safe (Okabe-Ito), the baseline in grey.
COLOURS = ("#666666", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")


def smoothed(series: Series, decay: float) -> Series:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    smooth, average = {}, 0.0
    for count, (step, value) in enumerate(series.items(), start=1):
        average = decay * average + (1 - decay) * value
        smooth[step] = average / (1 - decay**count)
    return smooth


def told_apart(connections: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Labels of runs: their connections, and their folders where several have the same."""
    return [
        label if connections.count(label) == 1 else f"{label} ({folder.name})"
        for label, folder in zip(connections, folders, strict=True)
    ]


def plot_losses(
    runs: Sequence[tuple[str, Path]], out: Path, decay: float = 0.9, against: Sequence[Path | None] = ()
) -> Path:
    """Draw the training curves of runs, raw and smoothed, and the difference of the smoothed ones to their baselines.

    Args:
        runs: label and folder of each run. Those of one label share a colour.
        out: the PNG.
        decay: of the moving average; 0.999 in the paper's figures, which have a thousand times more steps.
        against: folder of each run's baseline, one of `runs`, None for a baseline itself; the first run for all where
            none are given.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {run_dir: read_metrics(run_dir).loss for _, run_dir in runs}
    smooth = {run_dir: smoothed(losses, decay) for run_dir, losses in curves.items()}
    against = against or [None, *[runs[0][1]] * (len(runs) - 1)]
    labels = [label for label, _ in runs]
    colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(dict.fromkeys(labels))}
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    for number, ((label, run_dir), base_dir) in enumerate(zip(runs, against, strict=True)):
        losses, curve, base = curves[run_dir], smooth[run_dir], smooth[base_dir or run_dir]
        colour = colours[label]
        top.plot(losses.keys(), losses.values(), color=colour, alpha=0.25, linewidth=0.8)
        same = [list(smooth[other].values())[-1] for name, other in runs if name == label]
        text = f"{label}: EMA {statistics.fmean(same):.3f}" + (f", mean of {len(same)}" if len(same) > 1 else "")
        is_first = labels.index(label) == number
        top.plot(curve.keys(), curve.values(), color=colour, linewidth=1.8, label=text if is_first else None)
        shared = [step for step in curve if step in base]
        bottom.plot(shared, [curve[step] - base[step] for step in shared], color=colour, linewidth=1.5)
    top.set(ylabel="training loss", title=f"Training loss, raw and EMA {decay:g}")
    top.legend(frameon=False, loc="upper right")
    of_seeds = len({base_dir for base_dir in against if base_dir is not None}) > 1
    bottom.set(xlabel="iteration", ylabel=f"EMA minus\n{runs[0][0]}" + (", by seed" if of_seeds else ""))
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    plt.close(figure)
    return out
