"""Pieces of a page: bars and time lines as SVG whose widths are percentages, and text beside it that keeps its size."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Segment(NamedTuple):
    """A stretch of a bar.

    Attributes:
        colour: name of its CSS class, `forward` or `inter` say.
        value: its length, in the chart's unit.
        tip: what the pointer shows.
    """

    colour: str
    value: float
    tip: str


class Row(NamedTuple):
    """A bar with its name before it and its value behind it.

    Attributes:
        name, note: shown before, the note smaller.
        segments: of the bar, from the left.
        value: shown behind.
        is_computed: drawn hatched: a model's result, not a count.
    """

    name: str
    segments: Sequence[Segment]
    value: str
    note: str = ""
    is_computed: bool = False


def bars(rows: Sequence[Row]) -> str:
    """Stacked horizontal bars, from top to bottom; the longest one fills the width."""
    full = max((sum(s.value for s in row.segments) for row in rows), default=0.0) or 1.0
    return f'<div class="bars">{"".join(_bar(row, full) for row in rows)}</div>'


def _bar(row: Row, full: float) -> str:
    rects, at = [], 0.0
    for segment in row.segments:
        rects.append(_rect(segment.colour, at / full, segment.value / full, segment.tip))
        at += segment.value
    note = f" <small>{escape(row.note)}</small>" if row.note else ""
    kind = "bar computed" if row.is_computed else "bar"
    label = f"{row.name}: {row.value}"
    return (
        f'<div class="name">{escape(row.name)}{note}</div>'
        f'<svg class="{kind}" role="img" aria-label="{escape(label)}">{"".join(rects)}</svg>'
        f'<div class="value">{escape(row.value)}</div>'
    )


class Stretch(NamedTuple):
    """A stretch of time.

    Attributes:
        colour: name of its CSS class.
        start, end: seconds.
        tip: what the pointer shows.
    """

    colour: str
    start: float
    end: float
    tip: str


def timelines(rows: Sequence[tuple[str, str, Sequence[Stretch]]], seconds: float, ticks: Sequence[str]) -> str:
    """Time lines one below another.

    Args:
        rows: name, note and stretches of each.
        seconds: at the right edge.
        ticks: texts at even distances along the axis, from its left to its right edge.
    """
    lines = []
    for name, note, stretches in rows:
        rects = (_rect(s.colour, s.start / seconds, (s.end - s.start) / seconds, s.tip) for s in stretches)
        lines.append(
            f'<div class="name">{escape(name)} <small>{escape(note)}</small></div>'
            f'<svg class="line" role="img" aria-label="{escape(name)}, time line">{"".join(rects)}</svg>'
        )
    axis = "".join(f"<span>{escape(tick)}</span>" for tick in ticks)
    return f'<div class="timelines">{"".join(lines)}<div class="axis">{axis}</div></div>'


def _rect(colour: str, start: float, width: float, tip: str) -> str:
    return (
        f'<rect class="{colour}" x="{100 * start:.3f}%" width="{100 * width:.3f}%" height="100%">'
        f"<title>{escape(tip)}</title></rect>"
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What the colours mean: CSS class and text of each."""
    items = "".join(f'<li><i class="{colour}"></i>{escape(text)}</li>' for colour, text in entries)
    return f'<ul class="legend">{items}</ul>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are text and whose others are numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ("" if at < words else ' class="number"' for at in range(len(cells)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    head = line(heads, "th")
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(name: str, title: str, caption: str, *content: str) -> str:
    """A chart with its title and what it says; `caption` is HTML."""
    return (
        f'<figure id="{name}"><figcaption><h2>{escape(title)}</h2><p>{caption}</p></figcaption>'
        f"{''.join(content)}</figure>"
    )
