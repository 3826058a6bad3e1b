"""Values of JSON: tables as lists of rounded numbers, and the facts that every analysis of a checkpoint begins with."""

import math
from typing import Any

from torch import Tensor

from megatron_fc.analysis.source import Source
from megatron_fc.checkpoints.integrity import step_of
from megatron_fc.runs.summary import surroundings

_DIGITS = 6


def rows(table: Tensor) -> Any:
    """A tensor as nested lists; None for NaN, which JSON does not have."""
    return _rounded(table.double().tolist())


def facts_of(source: Source, tokens: int) -> dict[str, Any]:
    """What an analysis is of."""
    is_release = source.checkpoint.name == "release"
    return {
        "connection": source.recipe.label,
        "checkpoint": str(source.checkpoint),
        "iteration": 0 if is_release else step_of(source.checkpoint),
        "tokens": tokens,
        **surroundings(),
    }


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return None if math.isnan(values) else float(f"{values:.{_DIGITS}g}")
