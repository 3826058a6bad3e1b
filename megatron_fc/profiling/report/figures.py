"""The charts of a page."""

from collections.abc import Iterable, Mapping, Sequence

from megatron_fc.planning.counts import PHASES, DeviceCount, Phase, total_device, total_network
from megatron_fc.profiling.kinds import KINDS
from megatron_fc.profiling.records import Rank, Report
from megatron_fc.profiling.report.charts import Row, Segment, Stretch, bars, figure, legend, table, timelines
from megatron_fc.profiling.report.side_by_side import StreamBytes
from megatron_fc.profiling.units import show_bytes, show_count, show_number, show_rate, show_seconds

_MOST_RANKS = 32  # drawn one by one
_MODULES = 20  # listed


def kinds(report: Report) -> str:
    """Device memory by kind of layer and phase."""
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
        "Bytes read and written per token, all ranks together. Every operation counts its operands and results once, "
        "as if no cache kept anything from one operation to the next. The residual stream is connections, norms and "
        "additions.",
        _phase_legend(key.phase for key in values),
        bars(rows),
        _details("In numbers", _kind_table(report)),
        _modules(report),
    )


def side_by_side(streams: Sequence[StreamBytes]) -> str:
    """The residual stream under several connections."""
    rows = []
    for stream in streams:
        how = "computed" if stream.is_computed else "counted"
        if stream.ratio is not None:
            how += f", {stream.ratio:.2f}×"
        segments = _phases(stream.phases, stream.label)
        rows.append(Row(stream.label, segments, show_bytes(stream.total), how, stream.is_computed))
    return figure(
        "streams",
        "The residual stream, side by side",
        "Bytes per token and layer. Solid bars were counted in runs, hatched ones are computed from formulas; ratios "
        "are to the residual that was counted, or computed, likewise. Compare fused with ideal, where every tensor "
        "moves once, and torch with unfused, where every operation moves its own. Computed residuals have one kernel "
        "per norm, counted ones what torch has: several on CPUs.",
        _phase_legend(phase for stream in streams for phase in stream.phases),
        bars(rows),
    )


def network(report: Report) -> str:
    """Bytes sent, by group."""
    rows = [
        Row(group, _sent(group, intra, inter), show_bytes(intra + inter), _share_between_nodes(intra, inter))
        for group, (intra, inter) in sorted(report.by_group().items(), key=lambda item: -sum(item[1]))
    ]
    return figure(
        "network",
        "Network by group",
        "Bytes that ranks send per token, all ranks together, by the parallelism whose collectives send them; for ring "
        "algorithms.",
        *(
            [_network_legend(), bars(rows), _details("By collective", _collective_table(report))]
            if sum(report.network_bytes_per_token)
            else ["<p>Nothing was sent.</p>"]
        ),
    )


def nodes(report: Report) -> str:
    """Balance between nodes."""
    rows = []
    for host in report.hosts:
        here = [rank for rank in report.ranks if rank.host == host]
        rows.append((host, show_number(len(here), "rank"), here))
    busiest = _imbalance([_device(here) for _, _, here in rows])
    return figure(
        "nodes",
        "Balance of nodes",
        f"Per step. The busiest node moves {busiest} as many bytes of device memory as the mean.",
        _balance(rows),
    )


def ranks(report: Report) -> str:
    """Balance between ranks."""
    drawn = sorted(report.ranks, key=lambda rank: -rank.seconds_per_step)[:_MOST_RANKS]
    drawn.sort(key=lambda rank: rank.rank)
    busiest = _imbalance([_device([rank]) for rank in report.ranks])
    slowest = _imbalance([rank.seconds_per_step for rank in report.ranks])
    more = f" The {len(drawn)} slowest of {len(report.ranks)} ranks." if len(drawn) < len(report.ranks) else ""
    return figure(
        "ranks",
        "Balance of ranks",
        f"Per step. The busiest rank moves {busiest} as many bytes of device memory as the mean; the slowest takes "
        f"{slowest} the mean time.{more}",
        _balance([(*_names(report, rank), [rank]) for rank in drawn]),
    )


def timeline(report: Report) -> str:
    """The last step that is complete on all ranks."""
    title, steps = "Time line of a step", min(len(rank.timeline) for rank in report.ranks)
    if steps == 0:
        return figure("timeline", title, "No step is complete on all ranks.")
    shown = [(rank, rank.timeline[steps - 1]) for rank in report.ranks[:_MOST_RANKS]]
    begin = min(span.start for _, spans in shown for span in spans)
    length = max(span.end for _, spans in shown for span in spans) - begin
    rows = []
    for rank, spans in shown:
        tips = [f"{span.phase}, {show_seconds(span.end - span.start)}" for span in spans]
        stretches = [
            Stretch(span.phase, span.start - begin, span.end - begin, tip)
            for span, tip in zip(spans, tips, strict=True)
        ]
        rows.append((*_names(report, rank), stretches))
    return figure(
        "timeline",
        title,
        f"Step {report.run.from_step + steps - 1}, slowed down by counting: read the order, not the length. "
        "Gaps are waits for other stages and for data; optimizer is all that follows the last backward pass, gradient "
        "reduction and logging included. By the clocks of the hosts; on devices, the time at which work was queued.",
        _phase_legend(span.phase for _, spans in shown for span in spans),
        timelines(rows, length, [show_seconds(length * at / 4) for at in range(5)]),
    )


def _phases(parts: Mapping[Phase, float], name: str) -> list[Segment]:
    there = [phase for phase in PHASES if phase in parts]
    return [Segment(phase, parts[phase], f"{name}, {phase}: {show_bytes(parts[phase])}") for phase in there]


def _phase_legend(phases: Iterable[Phase]) -> str:
    there = set(phases)
    return legend((phase, phase) for phase in PHASES if phase in there)


def _sent(name: str, intra: float, inter: float) -> list[Segment]:
    return [
        Segment("intra", intra, f"{name}, within nodes: {show_bytes(intra)}"),
        Segment("inter", inter, f"{name}, between nodes: {show_bytes(inter)}"),
    ]


def _share_between_nodes(intra: float, inter: float) -> str:
    return f"{inter / (intra + inter):.0%} between nodes" if intra + inter else ""


def _network_legend() -> str:
    return legend([("intra", "within a node"), ("inter", "between nodes")])


def _details(title: str, sums: str) -> str:
    return f"<details><summary>{title}</summary>{sums}<p>Sums over all ranks and counted steps.</p></details>"


def _kind_table(report: Report) -> str:
    there = {key for rank in report.ranks for key in rank.kinds}
    keys = sorted(there, key=lambda key: (KINDS.index(key.kind), PHASES.index(key.phase)))
    measured = any(count.seconds is not None for rank in report.ranks for count in rank.kinds.values())
    rows = []
    for key in keys:
        its_ranks = [rank for rank in report.ranks if key in rank.kinds]
        total = total_device(rank.kinds[key] for rank in its_ranks)
        rows.append([*key, show_count(total.calls), show_bytes(total.read_bytes), show_bytes(total.written_bytes)])
        if measured:
            rows[-1] += _speed(total, its_ranks)
    heads = ["kind", "phase", "calls", "read", "written"] + ["time", "speed", "of a copy's"] * measured
    return table(heads, rows, words=2)


def _speed(total: DeviceCount, ranks: Sequence[Rank]) -> list[str]:
    """Time, bytes per second, and share of what a copy on the same devices reached."""
    if not total.seconds:
        return ["-", "-", "-"]
    rate = (total.read_bytes + total.written_bytes) / total.seconds
    copies = [rank.copy_bytes_per_second for rank in ranks if rank.copy_bytes_per_second]
    share = f"{rate / (sum(copies) / len(copies)):.0%}" if copies else "-"
    return [show_seconds(total.seconds), show_rate(rate), share]


def _modules(report: Report) -> str:
    by_module: dict[str, DeviceCount] = {}
    for key, count in report.device.items():
        name = key.module or ("optimizer" if key.phase == "optimizer" else "outside of modules")
        by_module.setdefault(name, DeviceCount()).add(count)
    busiest = sorted(by_module.items(), key=lambda item: -(item[1].read_bytes + item[1].written_bytes))[:_MODULES]
    rows = [[name, show_count(c.calls), show_bytes(c.read_bytes), show_bytes(c.written_bytes)] for name, c in busiest]
    return _details(
        f"The {len(rows)} busiest of {len(by_module)} modules", table(["module", "calls", "read", "written"], rows)
    )


def _collective_table(report: Report) -> str:
    keys = {key for rank in report.ranks for key in rank.network}
    rows = []
    for key in sorted(keys, key=lambda key: (key.group, key.collective, key.phase)):
        total = total_network(rank.network[key] for rank in report.ranks if key in rank.network)
        when = "outside of both" if key.phase == "optimizer" else key.phase
        sums = [total.payload_bytes, total.intra_node_bytes, total.inter_node_bytes]
        rows.append([key.group, key.collective, when, show_count(total.calls), *map(show_bytes, sums)])
    return table(["group", "collective", "phase", "calls", "payload", "within nodes", "between nodes"], rows, words=3)


def _balance(rows: Sequence[tuple[str, str, Sequence[Rank]]]) -> str:
    device, sent, seconds = [], [], []
    for name, note, its_ranks in rows:
        moved, slowest = _device(its_ranks), max(rank.seconds_per_step for rank in its_ranks)
        intra, inter = (sum(rank.network_bytes_per_step[at] for rank in its_ranks) for at in (0, 1))
        device.append(Row(name, [Segment("device", moved, f"{name}: {show_bytes(moved)}")], show_bytes(moved), note))
        sent.append(Row(name, _sent(name, intra, inter), show_bytes(intra + inter), note))
        time = show_seconds(slowest)
        seconds.append(Row(name, [Segment("time", slowest, f"{name}: {time}")], time, note))
    return (
        f'<div class="columns"><section><h3>device memory</h3>{bars(device)}</section>'
        '<section><h3>sent<i class="intra"></i>within the node<i class="inter"></i>to others</h3>'
        f"{bars(sent)}</section><section><h3>time</h3>{bars(seconds)}</section></div>"
    )


def _device(its_ranks: Sequence[Rank]) -> float:
    return sum(rank.device_bytes_per_step for rank in its_ranks)


def _imbalance(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{max(values) / mean:.2f}×" if mean else "1.00×"


def _names(report: Report, rank: Rank) -> tuple[str, str]:
    place = " ".join(f"{name}{at}" for name, at in rank.coordinates.items() if report.run.layout[name] > 1)
    return f"rank {rank.rank}", f"{rank.host} {place}"
