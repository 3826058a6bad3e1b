"""Errors that are one sentence for the user: a wrong input, with field, value and remedy; a node at fault."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input. Its message is all that the user sees; commands end with exit code 2."""


class NodeError(Exception):
    """A node or the network is at fault: the same may work elsewhere or later. Commands end with exit code 75.

    Attributes:
        seen_by_all: all ranks raise it, with the same words.
    """

    def __init__(self, text: str, seen_by_all: bool = False) -> None:
        super().__init__(text)
        self.seen_by_all = seen_by_all


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Return e.g. ``unknown frac option 'rat': did you mean 'rate'?`` (all names when none is near)."""
    names = sorted(valid)
    if near := difflib.get_close_matches(name, names, cutoff=0.6):
        # Of names that are equally near, one with the same letters: they were mixed up.
        best = next((match for match in near if sorted(match) == sorted(name)), near[0])
        return f"unknown {what} {name!r}: did you mean {best!r}?"
    listed = ", ".join(names) if len(names) <= 20 else f"{len(names)} names, Megatron's arguments among them"
    return f"unknown {what} {name!r}: valid are {listed}"
