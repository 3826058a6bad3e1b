"""Spikes of a training curve: single steps far above the steps before them.

OLMo 2 (arXiv 2501.00656) counts values seven standard deviations above a rolling mean. Here the rolling value is a
median and the deviation comes from the changes from step to step, so that neither the fall of a young loss nor a spike
that is still in the window hides the next one.
"""

import itertools
import math
import statistics
from collections import deque

from megatron_fc.runs.metrics import Series

DEVIATIONS = 7.0
WINDOW, LEAST = 32, 16  # steps that a value is compared with, and how many there must be
_MAD = 1.4826  # from the median of |x| to the standard deviation of a normal x


def spikes(series: Series) -> list[int]:
    """Return the steps at which spikes begin; steps in a row are one spike. What is not finite is one, too."""
    found: list[int] = []
    before: deque[float] = deque(maxlen=WINDOW)
    was_high = False
    for step, value in series.items():
        is_high = not math.isfinite(value) or (len(before) >= LEAST and value > _limit(list(before)))
        if is_high and not was_high:
            found.append(step)
        was_high = is_high
        if not is_high:
            before.append(value)
    return found


def _limit(values: list[float]) -> float:
    changes = [abs(b - a) for a, b in itertools.pairwise(values)]
    deviation = _MAD * statistics.median(changes) / math.sqrt(2)
    return statistics.median(values) + DEVIATIONS * deviation
