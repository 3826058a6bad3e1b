"""Predicted, not measured: time of all that stands between the sub-layers of a layer, on an H200.

    python benchmarks/layer_time.py

takes rows and shares from the recorded predictions and writes docs/images/layer-time.png and
results/layer-time-h200.{json,md}. No GPU is needed. A layer follows another, so that it is two boundaries.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
from compiled import Shape
from laboratory.simulator.assumptions import H200, fingerprint
from launched import BYTES, rows_moved
from predict import Prediction, read

WIDTH, TOKENS = 2048, 16384
FIRST, NOW = (record.RESULTS / f"predicted-h200{which}.json" for which in ("-first-kernels", ""))
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "layer-time.png"
STOCK_ROWS = 22  # two norms, two sums, forward and backward (docs/traffic.md)


@dataclass(frozen=True)
class Bar:
    """Microseconds of a layer, forward and backward, in the case that is thought likely and in the low one."""

    scheme: str
    forward: float
    backward: float
    low: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def copied(rows: float) -> float:
    """Microseconds in which a copy moves so many rows of every token."""
    return rows * WIDTH * BYTES * TOKENS / (H200.copy_tbs * 1e6)


def boundaries(scheme: str, predictions: list[Prediction], rate: int, slots: int) -> Bar:
    """A layer after another: its two boundaries."""

    def times(direction: str) -> tuple[float, float]:
        shape = Shape(f"boundary {direction}", WIDTH, rate, slots)
        [found] = [p for p in predictions if p.shape == shape and p.tokens == TOKENS]
        ideal = 2 * copied(rows_moved(shape))
        return 100 * ideal / found.mid, 100 * ideal / found.low

    (forward, low_forward), (backward, low_backward) = times("forward"), times("backward")
    return Bar(scheme, forward, backward, low_forward + low_backward)


def bars() -> list[Bar]:
    first, now = read(FIRST), read(NOW)
    stock = Bar("Residual, stock, at the speed of a copy", copied(10), copied(STOCK_ROWS - 10), copied(STOCK_ROWS))
    return [
        stock,
        boundaries("DFCx4, first kernels", first, 4, 4),
        boundaries("DFCx4, now", now, 4, 4),
        boundaries("DFCx2, now", now, 2, 2),
        boundaries("DHCx2, now", now, 1, 2),
        boundaries("DHCx4, now", now, 1, 4),
    ]


def draw(rows: list[Bar], path: Path) -> None:
    """Horizontal bars, forward and backward one after the other, the low case as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 11}):
        figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
        names = [row.scheme for row in rows]
        axes.barh(names, [row.forward for row in rows], color="#0f766e", label="forward")
        backward = [row.backward for row in rows]
        axes.barh(names, backward, left=[row.forward for row in rows], color="#7fb8b2", label="backward")
        axes.plot([row.low for row in rows], names, "|", color="#c2570c", markersize=16, label="low case")
        for row in rows:
            text = f" {row.total:.0f} µs, {row.total / rows[0].total:.2f}x"
            axes.text(max(row.total, row.low), row.scheme, text, va="center")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(max(row.total, row.low) for row in rows))
        axes.set_xlabel(f"µs per layer, predicted: H200, {TOKENS:,} tokens, d = {WIDTH}, bf16")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def page(result: dict[str, Any], rows: list[Bar]) -> str:
    columns = ("", "forward, µs", "backward, µs", "both", "low case", "times stock")
    lines = [
        (
            row.scheme,
            *(f"{value:.0f}" for value in (row.forward, row.backward, row.total, row.low)),
            f"{row.total / rows[0].total:.2f}",
        )
        for row in rows
    ]
    return (
        record.heading("Predicted, not measured: what stands between the sub-layers of a layer", result)
        + f"Assumptions {result['assumptions']}. H200, {TOKENS:,} tokens, d = {WIDTH}, bf16, RMSNorm in the pass; a "
        "layer that follows another. Stock is counted at the speed of a copy, which no kernel exceeds. Launches that "
        "add up programs' sums, and the host, are left out. [What this is worth](../../docs/laboratory.md).\n\n"
        + record.table(columns, lines)
    )


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = bars()
    result = record.facts("cpu") | {"assumptions": fingerprint(), "rows": [asdict(row) for row in rows]}
    text = page(result, rows)
    (record.RESULTS / "layer-time-h200.json").write_text(json.dumps(result, indent=2) + "\n")
    (record.RESULTS / "layer-time-h200.md").write_text(text)
    draw(rows, FIGURE)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
