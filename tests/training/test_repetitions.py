import numpy as np
import pytest

from megatron_fc.training.repetitions import MAX_PERIOD, MIN_REPETITIONS, repeats


def repeats_somewhere(ids: list[int], max_period: int, times: int) -> bool:
    """By trying every place and every period."""
    return any(
        ids[start : start + period * times] == ids[start : start + period] * times
        for period in range(1, max_period + 1)
        for start in range(len(ids) - period * times + 1)
    )


@pytest.mark.parametrize("seed", range(4))
def test_repetitions_are_those_of_a_search_by_hand(seed: int) -> None:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(300):
        ids = random.integers(0, 2, random.integers(0, 40)).tolist()  # of two tokens, so that many repeat
        max_period, times = int(random.integers(1, 6)), int(random.integers(2, 8))
        found.append(repeats(np.array(ids, np.uint16), max_period, times))
        assert found[-1] == repeats_somewhere(ids, max_period, times), (ids, max_period, times)
    assert 30 < sum(found) < 270


@pytest.mark.parametrize("period", range(1, MAX_PERIOD + 2))
def test_32_times_are_dropped_and_31_are_not(period: int) -> None:
    random = np.random.default_rng(period)
    unit, around = np.arange(1, period + 1), random.integers(100, 40_000, 50)
    for times in (MIN_REPETITIONS - 1, MIN_REPETITIONS):
        ids = np.concatenate((around, np.tile(unit, times), [0], around)).astype(np.uint16)
        dropped = times == MIN_REPETITIONS and period <= MAX_PERIOD
        assert repeats(ids) == repeats_somewhere(ids.tolist(), MAX_PERIOD, MIN_REPETITIONS) == dropped
