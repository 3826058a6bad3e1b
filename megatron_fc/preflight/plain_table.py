"""A table of plain text, for commands that must run where nothing is installed."""

import textwrap
from collections.abc import Sequence

_NARROWEST = 12
_GAP = "  "


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Lay cells out in columns; where lines would be longer than `width` characters, the widest columns fold."""
    columns = [[part for cell in column for part in cell.split("\n")] for column in zip(header, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = [line for row in (header, ["-" * n for n in widths], *rows) for line in _folded(row, widths)]
    return "\n".join(lines)


def _folded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [
        [line for part in cell.split("\n") for line in textwrap.wrap(part, width, break_on_hyphens=False) or [""]]
        for cell, width in zip(row, widths, strict=True)
    ]
    height = max(map(len, cells))
    padded = [cell + [""] * (height - len(cell)) for cell in cells]
    return [
        _GAP.join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]
