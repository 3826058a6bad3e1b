"""Megatron's log lines as numbers, for the progress display.

Megatron prints one line per logging interval, `iteration 10/ 200 | consumed samples: 80 | ... | lm loss: 7.1E+00 |`,
on the last rank.
"""

import re
from typing import Any

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*(\d+) \|(.*)")
_VALIDATION = re.compile(r"\b(validation\S*) loss at iteration (\d+)(?: on (\w+) set)? \|(.*)")
_FIGURE = re.compile(r"([^|:]+):\s*([-+\w.]+) \|")
_NAMES = {"elapsed time per iteration (ms)": "step_ms", "lm loss": "loss"}


def parse_iteration(line: str) -> dict[str, Any] | None:
    """Return the figures of an iteration line, None for any other line.

    Keys are Megatron's names in snake case (`consumed_samples`, `learning_rate`, `grad_norm` ...), with `iteration`,
    `iterations` (the total), `loss` (the language-model loss) and `step_ms`.
    """
    match = _ITERATION.search(line)
    if match is None:
        return None
    return {"iteration": int(match[1]), "iterations": int(match[2]), **_figures(match[3])}


def parse_validation(line: str) -> dict[str, Any] | None:
    """Return `iteration`, `set` (validation or test) and `loss` of a validation line, None for any other line."""
    match = _VALIDATION.search(line)
    if match is None:
        return None
    figures = _figures(match[4])
    return {"iteration": int(match[2]), "set": match[3] or "validation", "loss": figures.get("lm_loss_value")}


def _figures(text: str) -> dict[str, float]:
    figures = {}
    for name, value in _FIGURE.findall(text):
        key = _NAMES.get(name.strip()) or re.sub(r"\W+", "_", name.strip()).strip("_")
        try:
            figures[key] = float(value)
        except ValueError:
            continue
    return figures
