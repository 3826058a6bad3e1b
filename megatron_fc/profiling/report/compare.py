"""Reports of several runs that differ in their connections alone, against the first of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_fc.errors import UserError
from megatron_fc.profiling.files import read_report, report_file
from megatron_fc.profiling.kinds import KINDS
from megatron_fc.profiling.records import Report, check_same_but_connections
from megatron_fc.profiling.units import show_bytes, show_seconds

# Colour-blind safe (Okabe-Ito), the baseline in grey.
_COLOURS = ("#666666", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
_BAR = 40  # characters


def read_comparable(paths: Sequence[Path]) -> dict[str, Report]:
    """Read reports that can be compared, each by its label: its connection, and its folder where that is the same.

    Raises:
        UserError: one cannot be read, lacks ranks or is given twice, or two differ in more than their connections.
    """
    files = [report_file(path).resolve() for path in paths]
    if repeated := next((path for path, file in zip(paths, files, strict=True) if files.count(file) > 1), None):
        raise UserError(f"{repeated} is given twice: give each report once")
    reports = [read_whole(path) for path in paths]
    check_same_but_connections([(str(path), report.run) for path, report in zip(paths, reports, strict=True)])
    connections = [report.run.connection for report in reports]
    return {
        connection if connections.count(connection) == 1 else f"{connection} ({path})": report
        for connection, path, report in zip(connections, paths, reports, strict=True)
    }


def read_whole(path: Path) -> Report:
    """Read a report that can stand beside others.

    Raises:
        UserError: it cannot be read or lacks ranks.
    """
    report = read_report(path)
    report.refuse_lost_ranks(str(path))
    return report


def comparison_table(reports: dict[str, Report]) -> Table:
    """Bytes of a step and of a token, of all ranks together, and their ratio to the first report's."""
    table = Table(title="Memory traffic, read and written, all ranks together")
    table.add_column("")
    for number, label in enumerate(reports):
        table.add_column(f"{label}\nper step", justify="right")
        table.add_column("\nper token", justify="right")
        if number:
            table.add_column("\nratio", justify="right")
    tokens = next(iter(reports.values())).run.tokens_per_step
    for title, per_token in _rows(list(reports.values())):
        values = [per_token(report) for report in reports.values()]
        cells = []
        for number, value in enumerate(values):
            cells += [show_bytes(value * tokens), show_bytes(value)]
            if number:
                cells.append(f"{value / values[0]:.2f}x" if values[0] else "-")
        table.add_row(title, *cells)
    times = [report.seconds_per_step for report in reports.values()]
    cells = [show_seconds(times[0]), ""]
    for time in times[1:]:
        cells += [show_seconds(time), "", f"{time / times[0]:.2f}x" if times[0] else "-"]
    table.add_section()
    table.add_row("step time, while counting", *cells)
    return table


def _rows(reports: Sequence[Report]) -> list[tuple[str, Callable[[Report], float]]]:
    def of_kind(kind: str) -> Callable[[Report], float]:
        return lambda report: sum(value for key, value in report.by_kind().items() if key.kind == kind)

    def of_group(group: str) -> Callable[[Report], float]:
        return lambda report: sum(report.by_group().get(group, (0.0, 0.0)))

    there = {key.kind for report in reports for key in report.by_kind()}
    groups = sorted({group for report in reports for group in report.by_group()})
    return [
        ("device memory", lambda report: report.device_bytes_per_token),
        *((f"  {kind}", of_kind(kind)) for kind in KINDS if kind in there),
        ("network, within nodes", lambda report: report.network_bytes_per_token[0]),
        ("network, between nodes", lambda report: report.network_bytes_per_token[1]),
        *((f"  {group}", of_group(group)) for group in groups),
    ]


def terminal_bars(reports: dict[str, Report]) -> Text:
    """The main figures as bars of characters."""
    text, width = Text(), max(map(len, reports))
    for title, value_of in _PANELS:
        values = {label: value_of(report) for label, report in reports.items()}
        longest = max(values.values()) or 1.0
        text.append(f"{title}\n", "bold")
        for number, (label, value) in enumerate(values.items()):
            text.append(f"  {label:<{width}} ")
            text.append("█" * max(round(_BAR * value / longest), value > 0), _COLOURS[number % len(_COLOURS)])
            text.append(f" {show_bytes(value)}\n")
    return text


_PANELS: list[tuple[str, Callable[[Report], float]]] = [
    ("device memory, bytes per token", lambda report: report.device_bytes_per_token),
    (
        "residual stream, bytes per token and layer",
        lambda report: sum(report.stream_bytes_per_token_and_layer().values()),
    ),
    ("network, bytes per token", lambda report: sum(report.network_bytes_per_token)),
]


def plot_comparison(reports: dict[str, Report], out: Path) -> Path:
    """Draw the main figures of the reports as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(_PANELS), 1, figsize=(8, 1.1 + len(_PANELS) * (0.7 + 0.32 * len(reports))), layout="constrained"
    )
    for panel, (title, value_of) in zip(axes, _PANELS, strict=True):
        values = [value_of(report) for report in reports.values()]
        colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(values))]
        drawn = panel.barh(list(reports), values, color=colours, height=0.65)
        ratios = ["", *(f"  ({value / values[0]:.2f}x)" if values[0] else "" for value in values[1:])]
        labels = [show_bytes(value) + ratio for value, ratio in zip(values, ratios, strict=True)]
        panel.bar_label(drawn, labels, padding=4, fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.set_xlim(0, 1.25 * (max(values) or 1.0))
        panel.invert_yaxis()
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=140)
    except OSError as error:
        raise UserError(f"{out} cannot be written, {error.strerror}: give another --plot") from None
    finally:
        plt.close(figure)
    return out
