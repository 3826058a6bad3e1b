"""The error of a wrong input: one sentence that names the field, the value and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input. Its message is all that the user sees; commands end with exit code 2."""


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Return e.g. ``unknown frac option 'rat': did you mean 'rate'?`` (all names when none is near)."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"unknown {what} {name!r}: did you mean {near[0]!r}?"
    listed = ", ".join(names) if len(names) <= 20 else f"{len(names)} names, Megatron's arguments among them"
    return f"unknown {what} {name!r}: valid are {listed}"
