"""The report as Markdown, for logs, issues and mails."""

from collections.abc import Iterable, Sequence

from megatron_fc.planning.counts import PHASES
from megatron_fc.profiling.kinds import KINDS
from megatron_fc.profiling.records import Rank, Report
from megatron_fc.profiling.report.side_by_side import StreamBytes
from megatron_fc.profiling.units import show_bytes, show_number, show_seconds


def markdown(report: Report, streams: Sequence[StreamBytes]) -> str:
    """Return the main tables.

    Args:
        report: of the run.
        streams: the residual stream of this run and of others, counted and computed, side by side.
    """
    run = report.run
    lines = [f"# Memory traffic of {run.connection}", ""]
    lines += [
        f"{show_number(run.layout['world_size'], 'rank')} on {show_number(run.layout['nodes'], 'node')}, "
        f"{show_number(run.steps, 'step')} from {run.from_step} on, {run.tokens_per_step:,} tokens each; {run.date}.",
        "",
    ]
    lines += [f"**{warning}**\n" for warning in report.warnings()]
    kinds = report.by_kind()
    phases = [phase for phase in PHASES if any(key.phase == phase for key in kinds)]
    lines += ["Device memory, bytes read and written per token, all ranks together:", ""]
    lines += _table(
        ["", *phases, "all"],
        (
            [kind, *(_cell(parts.get(phase)) for phase in phases), _cell(sum(parts.values()))]
            for kind in KINDS
            if (parts := {key.phase: value for key, value in kinds.items() if key.kind == kind})
        ),
    )
    lines += ["", "Residual stream, bytes per token and layer:", ""]
    lines += _table(
        ["", "", *phases, "all", "to residual", "a step, all layers"],
        (
            [
                stream.label,
                "computed" if stream.is_computed else "counted",
                *(_cell(stream.phases.get(phase)) for phase in phases),
                _cell(stream.total),
                "-" if stream.ratio is None else f"{stream.ratio:.2f}x",
                show_bytes(stream.total * run.layers * run.tokens_per_step),
            ]
            for stream in streams
        ),
    )
    lines += ["", "Network, bytes sent per token, all ranks together:", ""]
    groups = report.by_group().items()
    lines += _table(["", "within nodes", "between nodes"], ([g, show_bytes(a), show_bytes(b)] for g, (a, b) in groups))
    lines += ["", "Ranks, per step:", ""]
    lines += _table(
        ["rank", "host", "device memory", "sent within the node", "to other nodes", "time"],
        (
            [str(rank.rank), rank.host, *map(show_bytes, _bytes(rank)), show_seconds(rank.seconds_per_step)]
            for rank in report.ranks
        ),
    )
    return "\n".join([*lines, "", f"    {run.command}", ""])


def _bytes(rank: Rank) -> list[float]:
    return [rank.device_bytes_per_step, *rank.network_bytes_per_step]


def _cell(value: float | None) -> str:
    return "-" if value is None else show_bytes(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *map(line, rows)]
