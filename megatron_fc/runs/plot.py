"""Training curves as a PNG."""

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

    curves = [(label, read_metrics(run_dir).loss) for label, run_dir in runs]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    base = smoothed(curves[0][1], decay)
    for number, (label, losses) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        smooth = smoothed(losses, decay)
        top.plot(losses.keys(), losses.values(), color=colour, alpha=0.25, linewidth=0.8)
        last = list(smooth.values())[-1]
        top.plot(smooth.keys(), smooth.values(), color=colour, linewidth=1.8, label=f"{label}: EMA {last:.3f}")
        shared = [step for step in smooth if step in base]
        bottom.plot(shared, [smooth[step] - base[step] for step in shared], color=colour, linewidth=1.5)
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
