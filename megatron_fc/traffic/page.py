"""The report as one HTML page that needs no network and no script."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from megatron_fc.traffic.charts import Row, Segment, Stretch, bars, figure, legend, table, timelines
from megatron_fc.traffic.counts import PHASES, DeviceCount, Phase, total_device
from megatron_fc.traffic.kinds import KINDS
from megatron_fc.traffic.records import Rank, Report, Span
from megatron_fc.traffic.side_by_side import Stream
from megatron_fc.traffic.units import show_bytes, show_count, show_rate, show_seconds

_MOST_RANKS = 32  # drawn one by one
_NETWORK = [("intra", "within the node"), ("inter", "to other nodes")]


def page(report: Report, streams: Sequence[Stream]) -> str:
    """Return the page.

    Args:
        report: of the run.
        streams: the residual stream of this run and of others, counted and computed, side by side.
    """
    run = report.run
    style = files("megatron_fc.traffic").joinpath("page.css").read_text()
    figures = [_kinds(report), _streams(streams), _network(report), _nodes(report), _ranks(report), _timeline(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>Memory traffic of {escape(run.connection)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>Memory traffic of <em>{escape(run.connection)}</em></h1>"
        f"<p>{escape(_subtitle(report))}</p></header>\n<main>{_warnings(report)}{_cards(report)}"
        f"{''.join(figures)}{_modules(report)}{_provenance(report)}</main></body></html>\n"
    )


def _subtitle(report: Report) -> str:
    run, hosts = report.run, report.hosts
    sizes = " ".join(f"{name.upper()}{size}" for name, size in run.layout.items() if len(name) <= 3 and size > 1)
    last = run.from_step + run.steps - 1
    window = f"step {last}" if run.steps == 1 else f"steps {run.from_step} to {last}"
    return (
        f"{show_count(run.parameters)} parameters in {run.layers} layers · {run.layout['world_size']} ranks on "
        f"{len(hosts)} {'node' if len(hosts) == 1 else 'nodes'}{f', {sizes}' if sizes else ''} · {run.device} · {window}, "
        f"{run.tokens_per_step:,} tokens each"
    )


def _warnings(report: Report) -> str:
    return "".join(f'<p class="warning" role="alert">{escape(text)}</p>' for text in report.warnings())


def _cards(report: Report) -> str:
    device, (intra, inter) = report.device_bytes_per_token, report.network_bytes_per_token
    stream = sum(report.stream_bytes_per_token_and_layer().values()) * report.run.layers
    cards = [
        ("device memory", show_bytes(device), "per token, read and written"),
        ("residual stream", f"{stream / device:.1%}" if device else "–", "of the device memory's traffic"),
        ("network", show_bytes(intra + inter), f"per token, {show_bytes(inter)} to other nodes"),
        ("step", show_seconds(report.seconds_per_step), "on the slowest rank, while counting"),
    ]
    items = "".join(f"<li><h3>{name}</h3><b>{value}</b><small>{what}</small></li>" for name, value, what in cards)
    return f'<ul class="cards">{items}</ul>'


def _kinds(report: Report) -> str:
    values = report.by_kind()
    total = sum(values.values()) or 1.0
    rows = []
    for kind in KINDS:
        parts = {key.phase: value for key, value in values.items() if key.kind == kind}
        if parts:
            share = sum(parts.values()) / total
            rows.append(Row(kind, _phases(parts, kind), show_bytes(sum(parts.values())), f"{share:.0%}"))
    return figure(
        "kinds",
        "Device memory by kind of layer",
        "Bytes read and written per token, all ranks together. Every operation counts its operands and results once, as "
        "if no cache kept anything from one operation to the next. The residual stream is connections, norms and "
        "additions.",
        _phase_legend(key.phase for key in values),
        bars(rows),
        f"<details><summary>In numbers</summary>{_kind_table(report)}</details>",
    )


def _phases(parts: dict[Phase, float], name: str) -> list[Segment]:
    return [
        Segment(phase, parts[phase], f"{name}, {phase}: {show_bytes(parts[phase])}") for phase in PHASES if phase in parts
    ]


def _phase_legend(phases: Iterable[Phase]) -> str:
    there = set(phases)
    return legend((phase, phase) for phase in PHASES if phase in there)


def _kind_table(report: Report) -> str:
    keys = sorted({key for rank in report.ranks for key in rank.kinds}, key=lambda k: (KINDS.index(k.kind), k.phase))
    measured = any(count.seconds is not None for rank in report.ranks for count in rank.kinds.values())
    rows = []
    for key in keys:
        there = [rank for rank in report.ranks if key in rank.kinds]
        total = total_device(rank.kinds[key] for rank in there)
        rows.append([*key, show_count(total.calls), show_bytes(total.read_bytes), show_bytes(total.written_bytes)])
        if measured:
            rows[-1] += _speed(total, there)
    heads = ["kind", "phase", "calls", "read", "written"] + ["time", "speed", "of a copy's"] * measured
    return table(heads, rows, words=2) + "<p>Sums over all ranks and counted steps.</p>"


def _speed(total: DeviceCount, ranks: Sequence[Rank]) -> list[str]:
    """Time, bytes per second, and share of what a copy on the same devices reached."""
    if not total.seconds:
        return ["–", "–", "–"]
    rate = (total.read_bytes + total.written_bytes) / total.seconds
    copies = [rank.copy_bytes_per_second for rank in ranks if rank.copy_bytes_per_second]
    share = f"{rate / (sum(copies) / len(copies)):.0%}" if copies else "–"
    return [show_seconds(total.seconds), show_rate(rate), share]


def _streams(streams: Sequence[Stream]) -> str:
    base = streams[0].total
    rows = []
    for stream in streams:
        ratio = "" if stream is streams[0] or not base else f", {stream.total / base:.2f}×"
        how = "computed" if stream.is_computed else "counted"
        parts = _phases(stream.phases, stream.label)
        rows.append(Row(stream.label, parts, show_bytes(stream.total), how + ratio, stream.is_computed))
    return figure(
        "streams",
        "The residual stream, side by side",
        f"Bytes per token and layer. Solid bars were counted in runs, hatched ones are computed from the operator. "
        f"Ratios are to {escape(streams[0].label)}.",
        _phase_legend(phase for stream in streams for phase in stream.phases),
        bars(rows),
    )


def _network(report: Report) -> str:
    groups = report.by_group()
    rows = [
        Row(
            group,
            [Segment("intra", intra, f"{group}, within nodes: {show_bytes(intra)}")]
            + [Segment("inter", inter, f"{group}, between nodes: {show_bytes(inter)}")],
            show_bytes(intra + inter),
            f"{inter / (intra + inter):.0%} to other nodes" if intra + inter else "",
        )
        for group, (intra, inter) in sorted(groups.items(), key=lambda item: -sum(item[1]))
    ]
    content = [legend(_NETWORK), bars(rows)] if sum(map(sum, groups.values())) else ["<p>Nothing was sent.</p>"]
    return figure(
        "network",
        "Network by group",
        "Bytes that ranks send per token, all ranks together, by the parallelism whose collectives send them; for ring "
        "algorithms.",
        *content,
        f"<details><summary>By collective</summary>{_collective_table(report)}</details>",
    )


def _collective_table(report: Report) -> str:
    keys = sorted({key for rank in report.ranks for key in rank.network}, key=lambda k: (k.group, k.collective, k.phase))
    rows = []
    for key in keys:
        counts = [rank.network[key] for rank in report.ranks if key in rank.network]
        sums = [sum(getattr(count, name) for count in counts) for name in ("payload_bytes", "intra_node_bytes")]
        sums.append(sum(count.inter_node_bytes for count in counts))
        calls = show_count(sum(count.calls for count in counts))
        rows.append([key.group, key.collective, key.phase, calls, *map(show_bytes, sums)])
    heads = ["group", "collective", "phase", "calls", "payload", "within nodes", "between nodes"]
    return table(heads, rows, words=3) + "<p>Sums over all ranks and counted steps.</p>"


def _nodes(report: Report) -> str:
    rows = []
    for host in report.hosts:
        here = [rank for rank in report.ranks if rank.host == host]
        rows.append((host, f"{len(here)} ranks", here))
    return figure(
        "nodes",
        "Balance of nodes",
        f"Per step. The busiest node moves {_imbalance([_device(here) for _, _, here in rows])} as many bytes of device "
        f"memory as the mean.",
        _balance(rows),
    )


def _ranks(report: Report) -> str:
    drawn = sorted(report.ranks, key=lambda rank: -rank.seconds_per_step)[:_MOST_RANKS]
    drawn.sort(key=lambda rank: rank.rank)
    rows = [(*_names(report, rank), [rank]) for rank in drawn]
    more = f" The {len(drawn)} slowest of {len(report.ranks)} ranks." if len(drawn) < len(report.ranks) else ""
    return figure(
        "ranks",
        "Balance of ranks",
        f"Per step. The busiest rank moves {_imbalance([_device([rank]) for rank in report.ranks])} as many bytes of "
        f"device memory as the mean; the slowest takes {_imbalance([r.seconds_per_step for r in report.ranks])} the "
        f"mean time.{more}",
        _balance(rows),
    )


def _balance(rows: Sequence[tuple[str, str, Sequence[Rank]]]) -> str:
    device = [
        Row(name, [Segment("device", _device(ranks), name)], show_bytes(_device(ranks)), note) for name, note, ranks in rows
    ]
    network = []
    for name, note, ranks in rows:
        intra, inter = (sum(rank.network_bytes_per_step[at] for rank in ranks) for at in (0, 1))
        segments = [Segment("intra", intra, f"{name}, within the node: {show_bytes(intra)}")]
        segments.append(Segment("inter", inter, f"{name}, to other nodes: {show_bytes(inter)}"))
        network.append(Row(name, segments, show_bytes(intra + inter), note))
    seconds = [
        Row(name, [Segment("time", max(r.seconds_per_step for r in ranks), name)], _slowest(ranks), note)
        for name, note, ranks in rows
    ]
    return (
        f'<div class="columns"><section><h3>device memory</h3>{bars(device)}</section>'
        f'<section><h3>sent<i class="intra"></i>within the node<i class="inter"></i>to others</h3>{bars(network)}</section>'
        f"<section><h3>time</h3>{bars(seconds)}</section></div>"
    )


def _device(ranks: Sequence[Rank]) -> float:
    return sum(rank.device_bytes_per_step for rank in ranks)


def _slowest(ranks: Sequence[Rank]) -> str:
    return show_seconds(max(rank.seconds_per_step for rank in ranks))


def _imbalance(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{max(values) / mean:.2f}×" if mean else "1.00×"


def _timeline(report: Report) -> str:
    steps = min(len(rank.timeline) for rank in report.ranks)
    if steps == 0:
        return figure("timeline", "Time line", "No step is complete on all ranks.")
    shown = [(rank, rank.timeline[steps - 1]) for rank in report.ranks[:_MOST_RANKS]]
    begin = min(span.start for _, spans in shown for span in spans)
    length = max(span.end for _, spans in shown for span in spans) - begin
    rows = [(*_names(report, rank), [_stretch(span, begin) for span in spans]) for rank, spans in shown]
    ticks = [show_seconds(length * at / 4) for at in range(5)]
    return figure(
        "timeline",
        "Time line of a step",
        f"Step {report.run.from_step + steps - 1}, while counting, which slows it down: what counts is the order. Gaps are "
        f"waits for other stages and data; optimizer is all that follows the last backward pass, gradient reduction and "
        f"logging included. By the clocks of the hosts.",
        _phase_legend(stretch.colour for _, _, stretches in rows for stretch in stretches),
        timelines(rows, length, ticks),
    )


def _stretch(span: Span, begin: float) -> Stretch:
    return Stretch(span.phase, span.start - begin, span.end - begin, f"{span.phase}, {show_seconds(span.end - span.start)}")


def _names(report: Report, rank: Rank) -> tuple[str, str]:
    place = " ".join(f"{name}{at}" for name, at in rank.coordinates.items() if report.run.layout[name] > 1)
    return f"rank {rank.rank}", f"{rank.host} {place}"


def _modules(report: Report) -> str:
    by_module: dict[str, DeviceCount] = {}
    for key, count in report.device.items():
        name = key.module or ("optimizer" if key.phase == "optimizer" else "outside of modules")
        by_module.setdefault(name, DeviceCount()).add(count)
    most = sorted(by_module.items(), key=lambda item: -(item[1].read_bytes + item[1].written_bytes))[:20]
    rows = [[name, show_count(c.calls), show_bytes(c.read_bytes), show_bytes(c.written_bytes)] for name, c in most]
    return (
        f"<details><summary>The {len(rows)} busiest of {len(by_module)} modules</summary>"
        f"{table(['module', 'calls', 'read', 'written'], rows)}<p>Sums over all ranks and counted steps.</p></details>"
    )


def _provenance(report: Report) -> str:
    run = report.run
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    facts = [("command", run.command), ("date", run.date), ("versions", versions), ("commit", run.git_commit or "–")]
    facts += [(name, ", ".join(f"{k}={v}" for k, v in part.items())) for name, part in
              (("model", run.model), ("layout", run.layout))]
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<section class="provenance"><h2>How it was made</h2><dl>{items}</dl></section>'
