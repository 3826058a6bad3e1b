"""Losses of variants of one model side by side, the first of them the reference."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def print_losses(losses: Mapping[str, float]) -> None:
    """Print a row per variant: its validation loss, and the difference to the first."""
    table = Table()
    for header in ("", "validation loss", "difference"):
        table.add_column(header, justify="right" if header else "left")
    reference = next(iter(losses.values()))
    for place, (name, loss) in enumerate(losses.items()):
        table.add_row(name, f"{loss:.4f}", f"{loss - reference:+.4f}" if place else "")
    Console().print(table)
