"""The figures of analyses as PNGs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fc.runs.plot import COLOURS

_INCH = 0.78  # of a small matrix
_SHORT = {"attention": "attn"}
_NUMBERS = 4  # slots up to which values are written into matrices
_LEAST_GAIN = 0.05  # of the axis, to each side of 1
_LOG_FROM = 100.0  # gains of a run that diverges
_LEAST = 1e-4  # distance of a cosine from 1 that is drawn
_COSINES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def plot_coefficients(found: Mapping[str, Any], out: Path) -> Path:
    """Draw alpha, gamma and beta of every site as small matrices; colours show what training changed."""
    plt = _pyplot()
    sites, names = found["sites"], ("alpha", "gamma", "beta")
    slots = len(sites[0]["alpha"]["mean"])

    def tables(of: str) -> list[list[Any]]:
        return [[np.array(site[name][of]).reshape(slots, -1) for site in sites] for name in names]

    means, starts = tables("mean"), tables("start")
    changes = [[mean - start for mean, start in zip(*both, strict=True)] for both in zip(means, starts, strict=True)]
    most = max(0.01, *(abs(change).max() for row in changes for change in row))
    size = (1.1 + _INCH * len(sites), 0.9 + _INCH * (len(names) - 0.4))
    figure, grid = plt.subplots(
        len(names), len(sites), figsize=(max(size[0], 4.5), size[1]), squeeze=False, layout="constrained"
    )
    drawn = None
    for row, name in enumerate(names):
        for axes, site, mean, change in zip(grid[row], sites, means[row], changes[row], strict=True):
            drawn = axes.imshow(change, cmap="RdBu_r", vmin=-most, vmax=most)
            _write_values(axes, mean, abs(change) > 0.65 * most, slots)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(f"{site['layer']} {_SHORT.get(site['sub_layer'], site['sub_layer'])}", fontsize=7)
        grid[row][0].set_ylabel(name, fontsize=9)
    bar = figure.colorbar(drawn, ax=grid, shrink=0.7, aspect=30, panchor=False)
    bar.set_label("change since the start", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        f"{found['connection']}: mean over {found['tokens']:,} tokens; row: source slot, column: destination",
        fontsize=9,
    )
    return _saved(figure, out)


def _write_values(axes: Any, table: Any, dark: Any, slots: int) -> None:
    if slots > _NUMBERS:
        return
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if dark[row, column] else "black"
        text = f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")
        axes.text(column, row, text, ha="center", va="center", fontsize=4.5, color=colour)


def plot_gain(found: Mapping[str, Any], out: Path) -> Path:
    """Draw the gain of the residual path: from the first site on, and between any two."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.25, 1), layout="constrained")
    tables = {name: np.array(table, dtype=float) for name, table in found["gain"].items()}
    said = {
        "forward": "largest sum of a destination (signal)",
        "backward": "largest sum of a source (gradient)",
        "singular": "largest singular value",
    }
    sites = len(tables["forward"])
    for number, (name, text) in enumerate(said.items()):
        # A gradient comes from the last site.
        values = tables[name][:, -1] if name == "backward" else tables[name][0]
        left.plot(range(1, sites + 1), values, marker=".", color=COLOURS[number + 1], label=text)
    left.axhline(1, color=COLOURS[0], linewidth=0.8)
    bottom, top = left.get_ylim()  # rounding of gains that are bounded by 1 is no picture
    left.set_ylim(min(bottom, 1 - _LEAST_GAIN), max(top, 1 + _LEAST_GAIN))
    left.ticklabel_format(axis="y", useOffset=False)
    left.set(xlabel="sub-layer", ylabel="gain", title="from the first to this sub-layer; backward from the last to it")
    left.title.set_fontsize(9)
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    left.grid(alpha=0.25)
    left.spines[["top", "right"]].set_visible(False)
    low, high = np.nanmin(tables["forward"]), np.nanmax(tables["forward"])
    limits = {"vmin": min(low, 1 - _LEAST_GAIN), "vmax": max(high, 1 + _LEAST_GAIN)}
    drawn = right.imshow(tables["forward"], cmap="viridis", **limits, extent=(0.5, sites + 0.5, sites + 0.5, 0.5))
    right.set(xlabel="to sub-layer", ylabel="from sub-layer", title="forward gain")
    right.title.set_fontsize(9)
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(drawn, ax=right)
    figure.suptitle(f"Gain of the residual path of {found['connection']}", fontsize=10)
    return _saved(figure, out)


def plot_similarity(analyses: Sequence[tuple[str, Mapping[str, Any]]], out: Path) -> Path:
    """Draw median and 5-95 % range of the cosine per sub-layer, for each analysis, spread out towards 1."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    lowest, highest = 0.0, _COSINES[-1]
    for number, (label, found) in enumerate(analyses):
        low, median, high = (np.array([pair[name] for pair in found["pairs"]]) for name in ("low", "median", "high"))
        # Side by side: bands would hide each other.
        places = np.arange(2, len(median) + 2) + 0.5 * ((number + 0.5) / len(analyses) - 0.5)
        colour = COLOURS[number % len(COLOURS)]
        axes.vlines(places, low, high, color=colour, alpha=0.35, linewidth=3)
        axes.plot(
            places, median, marker="o", markersize=4, color=colour, label=f"{label}: median {found['median']:.3f}"
        )
        lowest, highest = min(lowest, *low), max(highest, *high)
    axes.set_yscale("function", functions=(_from_one, lambda distance: 1 - 10**-distance))
    axes.set_yticks([tick for tick in (-0.9, -0.5, *_COSINES) if tick > lowest or tick >= 0])
    axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.set(ylim=(lowest, min(highest, 1 - _LEAST)), xlabel="sub-layer", ylabel="cosine")
    axes.set_title("Cosine of a sub-layer's input with that of the one before, median and 5-95 %", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)
    return _saved(figure, out)


def _from_one(cosine: Any) -> Any:
    """The scale of cosines: 0.9 is as far from 0 as 0.99 from 0.9."""
    return -np.log10(np.clip(1 - np.asarray(cosine, dtype=float), _LEAST, None))


def plot_gradients(analyses: Sequence[tuple[str, Mapping[str, Any]]], out: Path) -> Path:
    """Draw the gradient norm per layer, that of connections dashed, for each analysis."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for number, (label, found) in enumerate(analyses):
        colour, layers = COLOURS[number % len(COLOURS)], found["layers"]
        places = [layer["layer"] for layer in layers]
        axes.plot(places, [layer["weights"] for layer in layers], marker="o", color=colour, label=label)
        if any(layer["connections"] for layer in layers):
            of_connections = [layer["connections"] for layer in layers]
            axes.plot(places, of_connections, "--", marker=".", color=colour, label=f"{label}, connections")
    axes.set(xlabel="layer", ylabel="norm", yscale="log", title="Gradient norm per layer")
    axes.title.set_fontsize(10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)
    return _saved(figure, out)


def plot_growth(runs: Sequence[tuple[str, Sequence[Sequence[float]]]], out: Path) -> Path:
    """Draw the largest residual gain of runs over iterations."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    labels = list(dict.fromkeys(label for label, _ in runs))
    for number, label in enumerate(labels):
        of = [list(zip(*points, strict=True)) for name, points in runs if name == label]
        text = f"{label}: {max(values[-1] for _, values in of):.4g}" + (" at most" if len(of) > 1 else "")
        for place, (steps, values) in enumerate(of):
            colour = COLOURS[(number + 1) % len(COLOURS)]
            axes.plot(steps, values, color=colour, label=text if place == 0 else None)
    largest = max(value for _, points in runs for _, value in points)
    axes.set(xlabel="iteration", ylabel="gain", title="Largest gain of the residual path, without data")
    axes.set_yscale("log" if largest > _LOG_FROM else "linear")
    axes.title.set_fontsize(10)
    _finish(axes)
    return _saved(figure, out)


def _finish(axes: Any) -> None:
    """Put the legend beside the lines, which may be anywhere."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _saved(figure: Any, out: Path) -> Path:
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out
