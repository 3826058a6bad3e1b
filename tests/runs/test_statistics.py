"""Intervals of synthetic runs hold the true difference at their rate; pairing takes the seeds' part away."""

import random

import pytest

from megatron_fc.runs.statistics import differences, half_width, interval, student_quantile, values_needed

TRUE, OF_SEED, OF_RUN = -0.02, 0.1, 0.01


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 4, 2.77645),
        (0.975, 5, 2.57058),
        (0.975, 30, 2.04227),
        (0.995, 7, 3.49948),
        (0.9, 8, 1.396815),
        (0.975, 1001, 1.9623367),
    ],
)
def test_quantiles_are_those_of_tables(probability: float, degrees: int, quantile: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(quantile, rel=2e-6)


def runs(seeds: int, source: random.Random) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of a baseline and of a variant by seed: both have the seed's part, each a part of its own."""
    of_seed = {seed: source.gauss(5, OF_SEED) for seed in range(seeds)}
    base = {seed: loss + source.gauss(0, OF_RUN) for seed, loss in of_seed.items()}
    return base, {seed: loss + TRUE + source.gauss(0, OF_RUN) for seed, loss in of_seed.items()}


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_hold_the_truth_at_their_rate(seeds: int) -> None:
    source, trials = random.Random(seeds), 4000
    held = 0
    for _ in range(trials):
        base, variant = runs(seeds, source)
        found = interval(list(differences(variant, base).values()))
        assert found.half is not None
        held += abs(found.mean - TRUE) <= found.half
    # Three standard deviations of a share of 0.95 among 4000.
    assert held / trials == pytest.approx(0.95, abs=0.011)


def test_pairing_matters() -> None:
    base, variant = runs(5, random.Random(1))
    paired = interval(list(differences(variant, base).values()))
    # The same losses with the seeds mixed up.
    shifted = {(seed + 1) % 5: loss for seed, loss in variant.items()}
    unpaired = interval(list(differences(shifted, base).values()))
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.half is not None
    assert unpaired.half is not None
    assert unpaired.half > 4 * paired.half
    assert paired.half == pytest.approx(student_quantile(0.975, 4) * paired.deviation / 5**0.5)


def test_only_shared_seeds_are_compared() -> None:
    assert differences({1: 2.0, 2: 5.0, 4: 0.0}, {2: 4.0, 1: 2.5, 3: 1.0}) == {1: -0.5, 2: 1.0}
    alone = interval([0.5])
    assert (alone.half, alone.count, alone.excludes_zero) == (None, 1, False)
    assert interval([0.0, 1.1]).excludes_zero is False
    assert interval([1.0, 1.01]).excludes_zero is True


def test_how_many_seeds_an_interval_takes() -> None:
    needed = values_needed(0.03, 0.02)
    assert needed is not None
    assert half_width(0.03, needed) <= 0.02 < half_width(0.03, needed - 1)
    assert values_needed(1.0, 1e-3, most=50) is None
