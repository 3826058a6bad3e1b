"""Bytes that connections move per token and layer: residual, Frac-Connections, Hyper-Connections.

    python benchmarks/traffic_figure.py

writes docs/images/traffic.png and benchmarks/results/traffic-per-layer.{json,md}. Counted in bf16 at d = 2048 on layers
of Megatron's, forward and backward, outside of attention and MLP; the fused kernels run in the interpreter. Counted
is what a token more moves: parameters, read once per micro-batch, do not show. No GPU is needed.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import matplotlib
import matplotlib.colors
import torch
from torch import nn

import record
from counted_layers import count, layer, unfused_hyper_layer
from megatron_fc import FracConfig
from megatron_fc.connections import HyperConfig, ManifoldConfig
from megatron_fc.connections.costs.eager_traffic import mixing_kernels
from megatron_fc.connections.costs.traffic import Moves, Stream, hyper_ideal
from megatron_fc.planning.counts import total_device
from rank import one_rank

WIDTH, DTYPE, TOKENS = 2048, torch.bfloat16, 4
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "traffic.png"
KIB = 1024


@dataclass(frozen=True)
class Bar:
    """Bytes per token and layer of one scheme, read and written; computed where it is not counted."""

    family: str
    scheme: str
    counted: bool
    forward_bytes: float
    backward_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes


def counted(family: str, scheme: str, model: nn.Module, stream_width: int) -> Bar:
    """Count what a token more moves."""

    def totals(tokens: int) -> tuple[int, int]:
        h = torch.randn(tokens, 1, stream_width, dtype=DTYPE)
        count(model, h.clone())  # what is made once and kept
        counts = count(model, h)
        forward, backward = (
            total_device(c for key, c in counts.items() if key.phase == phase) for phase in ("forward", "backward")
        )
        return forward.read_bytes + forward.written_bytes, backward.read_bytes + backward.written_bytes

    few, many = totals(TOKENS), totals(2 * TOKENS)
    return Bar(family, scheme, True, *((b - a) / TOKENS for a, b in zip(few, many, strict=True)))


def computed(family: str, scheme: str, moves: Moves) -> Bar:
    """By a formula of the model."""
    passes = (t.read_bytes_per_token + t.written_bytes_per_token for t in (moves.forward, moves.backward))
    return Bar(family, scheme, False, *passes)


def bars(width: int) -> Iterator[Bar]:
    """All schemes in the order of the figure."""
    yield counted("Residual", "Megatron's default", layer(None, width, DTYPE), width)
    for rate in (2, 4):
        frac = FracConfig(rate=rate, backend="triton")
        yield counted("Frac-Connections", f"DFCx{rate}, fused kernels", layer(frac, width, DTYPE), width)
    for rate in (2, 4):
        frac = FracConfig(rate=rate, backend="torch")
        yield counted("Frac-Connections", f"DFCx{rate}, torch backend", layer(frac, width, DTYPE), width)
    stream = Stream(width, DTYPE.itemsize)
    for n in (2, 4):
        yield computed("Hyper-Connections", f"HCx{n}, ideal", hyper_ideal(stream, HyperConfig(slots=n)))
    for n in (2, 4):
        hyper = HyperConfig(slots=n, backend="triton")
        model = layer(hyper, width, DTYPE)
        yield counted("Hyper-Connections", f"DHCx{n}, fused kernels", model, hyper.stream_width(width))
    mixed = mixing_kernels(stream, ManifoldConfig(slots=4))
    yield computed("Hyper-Connections", "mHCx4, kernels and torch", mixed)
    for n in (2, 4):
        hyper = HyperConfig(slots=n, norm="layernorm")
        model = unfused_hyper_layer(hyper, width, DTYPE)
        yield counted("Hyper-Connections", f"DHCx{n}, unfused torch", model, hyper.stream_width(width))
    on_torch: tuple[HyperConfig | ManifoldConfig, ...] = (
        HyperConfig(slots=4, backend="torch"),
        ManifoldConfig(slots=4, backend="torch"),
    )
    for name, config in zip(("DHCx4", "mHCx4"), on_torch, strict=True):
        model = layer(config, width, DTYPE)
        yield counted("Hyper-Connections", f"{name}, torch backend", model, config.stream_width(width))


COLOURS = {"Residual": "#6b7280", "Frac-Connections": "#0f766e", "Hyper-Connections": "#c2570c"}


def _lighter(colour: str) -> tuple[float, ...]:
    return tuple(1 - 0.55 * (1 - part) for part in matplotlib.colors.to_rgb(colour))


def draw(rows: list[Bar], width: int, path: Path) -> None:
    """Horizontal bars, forward and backward one after the other, with their sum and its multiple of the first."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    with plt.rc_context({"font.size": 11, "hatch.linewidth": 0.8}):
        figure, axes = plt.subplots(figsize=(10, 5.6), layout="constrained")
        place, ticks = 0.0, []
        for number, row in enumerate(rows):
            first = number == 0 or rows[number - 1].family != row.family
            place += 1.75 if first and number else 1
            ticks.append(place)
            colour, start = COLOURS[row.family], 0.0
            if first:
                axes.text(0, place - 0.6, row.family, color=colour, weight="bold", va="bottom")
            for size, fill in ((row.forward_bytes, colour), (row.backward_bytes, _lighter(colour))):
                style = {"color": fill}
                if not row.counted:
                    style = {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
                axes.barh(place, size / KIB, left=start / KIB, height=0.72, linewidth=1, **style)
                start += size
            ratio = f"   {row.total_bytes / rows[0].total_bytes:.1f}x" if number else ""
            said = f" {row.total_bytes / KIB:.0f} KiB{ratio}" + ("" if row.counted else "   computed")
            axes.text(row.total_bytes / KIB, place, said, va="center")
        axes.set_yticks(ticks, [row.scheme for row in rows])
        axes.set_xlim(0, 1.22 * max(row.total_bytes for row in rows) / KIB)
        axes.set_xlabel("KiB read and written per token and layer")
        axes.set_title(
            "Device-memory traffic between the sub-layers of a transformer layer\n",
            loc="left",
            weight="bold",
            fontsize=13,
        )
        axes.text(
            0,
            1.02,
            f"d = {width}, bf16, norms at the sub-layers' inputs included; multiples of the residual connection",
            transform=axes.transAxes,
            color="#4b5563",
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(place + 0.6, 0)
        legend = [
            Patch(color="#374151", label="forward, counted"),
            Patch(color=_lighter("#374151"), label="backward, counted"),
            Patch(facecolor="white", edgecolor="#374151", hatch="////", label="computed: each tensor moved once"),
        ]
        axes.legend(handles=legend, loc="upper right", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def report(result: dict[str, object], rows: list[Bar]) -> str:
    """The page in Markdown."""
    columns = ("connections", "scheme", "how", "forward bytes", "backward bytes", "bytes", "to residual")
    lines = (
        (
            row.family,
            row.scheme,
            "counted" if row.counted else "computed",
            *(f"{size:,.0f}" for size in (row.forward_bytes, row.backward_bytes, row.total_bytes)),
            f"{row.total_bytes / rows[0].total_bytes:.2f}x",
        )
        for row in rows
    )
    heading = record.heading("Bytes that connections move per token and layer", result)
    return f"{heading}\nd = {result['width']}, {str(DTYPE)[6:]}. See docs/traffic.md.\n\n" + record.table(
        columns, lines, left=3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder for the results")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="the figure, a PNG")
    args = parser.parse_args()
    with one_rank():
        rows = list(bars(args.width))
    draw(rows, args.width, args.figure)
    result = record.facts("cpu") | {"width": args.width, "dtype": str(DTYPE), "rows": [asdict(row) for row in rows]}
    page = report(result, rows)
    args.output.mkdir(parents=True, exist_ok=True)
    # Bytes are the same on every machine, so the names have none.
    (args.output / "traffic-per-layer.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.output / "traffic-per-layer.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
