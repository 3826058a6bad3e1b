"""Spikes that were put into a noisy, falling curve are found, and nothing else is."""

import math
import random

from megatron_fc.runs.spikes import spikes


def curve(*at: int, height: float = 1.0, width: int = 1) -> dict[int, float]:
    source = random.Random(3)
    losses = {step: 5 + 3 * math.exp(-step / 40) + source.gauss(0, 0.05) for step in range(1, 401)}
    for step in at:
        for place in range(step, step + width):
            losses[place] += height
    return losses


def test_spikes_are_found_where_they_begin() -> None:
    assert spikes(curve()) == []
    assert spikes(curve(60, 200)) == [60, 200]
    assert spikes(curve(200, width=5)) == [200]
    # A second one soon after the first, which is not what it is compared with.
    assert spikes(curve(200, 204, width=2)) == [200, 204]


def test_noise_and_a_fall_are_none() -> None:
    assert spikes(curve(200, height=0.2)) == []
    assert spikes({step: 10 - step for step in range(100)}) == []


def test_what_is_not_finite_is_one() -> None:
    losses = curve()
    losses |= {5: math.nan, 6: math.inf, 300: math.inf}
    assert spikes(losses) == [5, 300]
