"""Means of a few runs with Student's intervals, paired by seed; by hand, since scipy is none of the dependencies."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of independent values, and how far from it the true mean may be.

    Attributes:
        mean: of the values.
        half: half the interval's width; None for one value, which says nothing of its spread.
        count: of the values.
        deviation: standard deviation of the values, None for one.
    """

    mean: float
    half: float | None
    count: int
    deviation: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean of values with Student's interval.

    Args:
        values: at least one.
        level: share of such intervals that hold the true mean, where the values are normal.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, 1, None)
    deviation = statistics.stdev(values)
    return Interval(mean, half_width(deviation, len(values), level), len(values), deviation)


def differences[Seed: Hashable](values: Mapping[Seed, float], base: Mapping[Seed, float]) -> dict[Seed, float]:
    """Values minus those of the baseline, of the seeds that both have.

    Runs of one seed share data, their order and first weights: what these do to the loss is in both, and cancels.
    """
    return {seed: value - base[seed] for seed, value in values.items() if seed in base}


def half_width(deviation: float, count: int, level: float = LEVEL) -> float:
    """Half the width of the interval of the mean of so many values, at least two, that deviate so much."""
    return student_quantile((1 + level) / 2, count - 1) * deviation / math.sqrt(count)


def values_needed(deviation: float, half: float, most: int = 10_000) -> int | None:
    """Return how many values that deviate so much give +-`half`; None where it takes more than `most`."""
    counts = range(2, most + 1)
    found = bisect_left(counts, True, key=lambda count: half_width(deviation, count) <= half)
    return counts[found] if found < len(counts) else None


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: from 0.5 on, below 1.
        degrees: of freedom, at least 1.
    """
    # Whatever the degrees, theta = atan(t / sqrt(degrees)) is between 0 and pi/2, and the distribution rises with it.
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _within(middle, degrees) > 2 * probability - 1 else (middle, high)
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """Probability of |t| <= sqrt(degrees) tan(theta): a finite series (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + is_odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total
