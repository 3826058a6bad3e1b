"""An analysis' files: JSON for programs, PNGs, and one HTML page of all analyses that a folder holds."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_fc.analysis import figures
from megatron_fc.analysis.losses import in_words
from megatron_fc.errors import UserError
from megatron_fc.profiling.files import write_atomically
from megatron_fc.profiling.report.charts import figure, table
from megatron_fc.profiling.report.document import document
from megatron_fc.runs.plot import plot_losses, told_apart

ANALYSES = ("losses", "coefficients", "similarity", "gradients")
Content = Mapping[str, Any]
Analyses = Sequence[tuple[Path, Content]]  # with their folders
Labelled = Sequence[tuple[str, Content]]


def write_analysis(out: Path, name: str, found: Content, others: Analyses = ()) -> list[Path]:
    """Add an analysis to a folder and make its page anew.

    Args:
        out: the folder.
        name: one of ANALYSES.
        found: its values.
        others: that stand beside it in figures, the first of them the baseline.

    Returns:
        The files that were written.

    Raises:
        UserError: `out` cannot be written.
    """
    file = write_atomically(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    return [file, *_DRAW[name](out, _labelled([*others, (out, found)])), write_page(out)]


def read_analyses(folders: Sequence[Path], name: str) -> Analyses:
    """Read analyses of one name.

    Raises:
        UserError: a folder has none.
    """
    return [(folder, _read(folder, name)) for folder in folders]


def other_tokens(found: Content, others: Analyses) -> list[str]:
    """Say which analyses are of another number of tokens than one that they stand beside."""
    return [
        f"note: {folder} is of {other['tokens']:,} tokens, this of {found['tokens']:,}: give both the same --samples"
        for folder, other in others
        if other["tokens"] != found["tokens"]
    ]


def refuse_other_checkpoint(out: Path, name: str, checkpoint: Path) -> None:
    """Check that a page would be of one checkpoint.

    Args:
        out: folder of analyses.
        name: of the one that will be added, or made anew.
        checkpoint: that it will be of.

    Raises:
        UserError: other analyses there are of another one.
    """
    for other in ANALYSES:
        if other in (name, "losses") or not (out / f"{other}.json").exists():
            continue
        theirs = _read(out, other)["checkpoint"]
        if Path(theirs).resolve() != checkpoint.resolve():
            raise UserError(f"{out} holds {other} of {theirs}, not of {checkpoint}: give another --out")


def write_page(out: Path) -> Path:
    """Make the page of all analyses in a folder."""
    there = {
        name: json.loads((out / f"{name}.json").read_text()) for name in ANALYSES if (out / f"{name}.json").exists()
    }
    labels = {content["connection"]: None for name, content in there.items() if name != "losses"}
    facts = next((content for name, content in there.items() if name != "losses"), None)
    subtitle = "" if facts is None else f"{facts['checkpoint']} · iteration {facts['iteration']:,}"
    sections = [_SECTIONS[name](out, content) for name, content in there.items()]
    return write_atomically(
        out / "analysis.html",
        document("Analysis of", ", ".join(labels) or "training curves", subtitle, "".join(sections)),
    )


def _read(folder: Path, name: str) -> Content:
    file = folder / f"{name}.json"
    try:
        content: Content = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no readable {name}.json: give the --out of `analyze {name}`") from None
    return content


def _labelled(analyses: Analyses) -> Labelled:
    connections = [str(content.get("connection")) for _, content in analyses]
    labels = told_apart(connections, [folder for folder, _ in analyses])
    return list(zip(labels, (content for _, content in analyses), strict=True))


def _draw_coefficients(out: Path, analyses: Labelled) -> list[Path]:
    found = analyses[-1][1]
    return [figures.plot_coefficients(found, out / "coefficients.png"), figures.plot_gain(found, out / "gain.png")]


def _draw_losses(out: Path, analyses: Labelled) -> list[Path]:
    found = analyses[-1][1]
    runs = [(run["name"], Path(run["run"])) for run in found["runs"]]
    against = [None if run["baseline"] is None else Path(run["baseline"]) for run in found["runs"]]
    drawn = [plot_losses(runs, out / "losses.png", found["decay"], against)]
    grown = [(run["name"], run["residual_gain"]) for run in found["runs"] if run["residual_gain"]]
    if grown:
        return [*drawn, figures.plot_growth(grown, out / "growth.png")]
    (out / "growth.png").unlink(missing_ok=True)  # of other runs
    return drawn


_DRAW: dict[str, Callable[[Path, Labelled], list[Path]]] = {  # the folder's own analysis is the last
    "coefficients": _draw_coefficients,
    "similarity": lambda out, analyses: [figures.plot_similarity(analyses, out / "similarity.png")],
    "gradients": lambda out, analyses: [figures.plot_gradients(analyses, out / "gradients.png")],
    "losses": _draw_losses,
}


def _coefficients(out: Path, found: Content) -> str:
    lines = [
        [
            f"{site['layer']} {site['sub_layer']}",
            f"{site['from_identity']['alpha']:.3f}",
            f"{site['from_identity']['beta']:.3f}",
            *(f"{_largest(site[name]['spread']):.4f}" for name in ("alpha", "gamma", "beta")),
        ]
        for site in found["sites"]
    ]
    heads = ["site", "alpha from identity", "beta from 1", "spread of alpha", "of gamma", "of beta"]
    return figure(
        "coefficients",
        "Coefficients",
        f"Means over {found['tokens']:,} tokens of validation data, coloured by how far they moved from their initial "
        f"values. A plain residual connection has alpha = I and beta = 1. The spread is the largest standard deviation "
        f"over tokens of a table's values: what data decide.",
        _image(out / "coefficients.png", "alpha, gamma and beta of every site"),
        _details(table(heads, lines)),
    ) + figure(
        "gain",
        "Gain of the residual path",
        f"By how much the product of alphas from one sub-layer to another can amplify what it carries. Doubly "
        f"stochastic alphas keep both sums at 1. The largest is {found['largest_gain']:.3f}.",
        _image(out / "gain.png", "gains of the residual path"),
    )


def _similarity(out: Path, found: Content) -> str:
    lines = [
        [f"{pair['layer']} {pair['sub_layer']}", *(f"{pair[name]:.3f}" for name in ("low", "median", "high"))]
        for pair in found["pairs"]
    ]
    return figure(
        "similarity",
        "Similarity of consecutive inputs",
        "Cosine between the inputs of a sub-layer and of the one before, before their norms: median over tokens, and "
        "the band from 5 to 95 %. Near 1 a sub-layer sees what the one before saw.",
        _image(out / "similarity.png", "cosine per sub-layer"),
        _details(table(["sub-layer", "5 %", "median", "95 %"], lines)),
    )


def _gradients(out: Path, found: Content) -> str:
    lines = [
        [str(layer["layer"]), f"{layer['weights']:.4g}", f"{layer['connections']:.4g}"] for layer in found["layers"]
    ]
    return figure(
        "gradients",
        "Gradients",
        f"Norm of each layer's gradient of the mean loss of {found['tokens']:,} tokens of validation data.",
        _image(out / "gradients.png", "gradient norm per layer"),
        _details(table(["layer", "weights", "connections"], lines)),
    )


def _losses(out: Path, found: Content) -> str:
    lines = []
    for run in found["runs"]:
        against = ["", ""]
        if run["baseline"] is not None:
            against = [in_words(run), earlier_in_words(run["earlier"])]
        counts = [str(len(run[name])) for name in ("loss_spikes", "gradient_spikes")]
        gain = f"{run['residual_gain'][-1][1]:.2f}" if run["residual_gain"] else ""
        lines.append([run["name"], run["seed"], f"{run['loss']:.4f}", *against, *counts, gain])
    heads = ["run", "seed", "loss", "difference", "times earlier", "loss spikes", "gradient spikes", "residual gain"]
    pictures = [("losses.png", "training curves")]
    if (out / "growth.png").exists():
        pictures.append(("growth.png", "residual gain over iterations"))
    return figure(
        "losses",
        "Training curves",
        f"Losses are moving averages with decay {found['decay']:g}, corrected for their start. A run is x times "
        f"earlier where it first has the loss at which its baseline ends, in brackets the 95 % interval of the "
        f"steps' noise.",
        *(_image(out / name, text) for name, text in pictures),
        table(heads, lines),
        table(["mean over seeds", "seeds", "difference, 95 %"], [_group(group) for group in found["groups"]]),
    )


def _group(group: Content) -> list[str]:
    return [group["name"], ", ".join(group["seeds"]), difference_in_words(group["difference"])]


def difference_in_words(found: Content) -> str:
    """Say e.g. ``-0.0341 ± 0.0170``."""
    return f"{found['mean']:+.4f}" + ("" if found["half"] is None else f" ± {found['half']:.4f}")


_SECTIONS: dict[str, Callable[[Path, Content], str]] = {
    "losses": _losses,
    "coefficients": _coefficients,
    "similarity": _similarity,
    "gradients": _gradients,
}


def earlier_in_words(found: Content) -> str:
    """Say e.g. ``1.15x (1.02 to 1.31)``."""
    if found["times"] is None:
        return "not reached"
    low = "not reached" if found["low"] is None else f"{found['low']:.2f}"
    return f"{found['times']:.2f}x (95 %: {low} to {found['high']:.2f})"


def _largest(values: Any) -> float:
    return max(map(_largest, values)) if isinstance(values, list) else float(values)


def _image(file: Path, text: str) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{escape(text)}">'


def _details(content: str) -> str:
    return f"<details><summary>In numbers</summary>{content}</details>"
