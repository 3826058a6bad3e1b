"""The report as one HTML page that needs no network and no script."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_fc.profiling.records import Report
from megatron_fc.profiling.report import figures
from megatron_fc.profiling.report.document import document
from megatron_fc.profiling.report.side_by_side import StreamBytes
from megatron_fc.profiling.units import show_bytes, show_count, show_number, show_seconds


def page(report: Report, streams: Sequence[StreamBytes]) -> str:
    """Return the page.

    Args:
        report: of the run.
        streams: the residual stream of this run and of others, counted and computed, side by side.
    """
    charts = [
        figures.kinds(report),
        figures.side_by_side(streams),
        figures.network(report),
        figures.nodes(report),
        figures.ranks(report),
        figures.timeline(report),
    ]
    body = f"{_warnings(report)}{_cards(report)}{''.join(charts)}{_provenance(report)}"
    return document("Memory traffic of", report.run.connection, _subtitle(report), body)


def _subtitle(report: Report) -> str:
    run = report.run
    sizes = " ".join(f"{name.upper()}{size}" for name, size in run.layout.items() if len(name) <= 3 and size > 1)
    last = run.from_step + run.steps - 1
    window = f"step {last}" if run.steps == 1 else f"steps {run.from_step} to {last}"
    return " · ".join(
        [
            f"{show_count(run.parameters)} parameters in {run.layers} layers",
            f"{show_number(run.layout['world_size'], 'rank')} on {show_number(run.layout['nodes'], 'node')}",
            *([sizes] if sizes else []),
            run.device,
            f"{window}, {run.tokens_per_step:,} tokens each",
        ]
    )


def _warnings(report: Report) -> str:
    return "".join(f'<p class="warning" role="alert">{escape(text)}</p>' for text in report.warnings())


def _cards(report: Report) -> str:
    device, (intra, inter) = report.device_bytes_per_token, report.network_bytes_per_token
    stream = sum(report.stream_bytes_per_token_and_layer().values()) * report.run.layers
    cards = [
        ("device memory", show_bytes(device), "per token, read and written"),
        ("residual stream", f"{stream / device:.1%}" if device else "-", "of the device memory's traffic"),
        ("network", show_bytes(intra + inter), f"per token, {show_bytes(inter)} to other nodes"),
        ("step", show_seconds(report.seconds_per_step), "on the slowest rank, while counting"),
    ]
    items = "".join(f"<li><h3>{name}</h3><b>{value}</b><small>{what}</small></li>" for name, value, what in cards)
    return f'<ul class="cards">{items}</ul>'


def _provenance(report: Report) -> str:
    run = report.run
    facts = {
        "command": run.command,
        "date": run.date,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items() if version),
        "commit": run.git_commit or "-",
        "layout": _listed(run.layout),
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    model = f"<details><summary>All of the model's arguments</summary><p>{escape(_listed(run.model))}</p></details>"
    return f'<section class="provenance"><h2>How it was made</h2><dl>{items}</dl>{model}</section>'


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
