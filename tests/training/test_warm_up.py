"""A learning rate that never reaches its peak is warned of, in samples and in iterations."""

from argparse import Namespace

import pytest

from megatron_fc.training.warm_up import never_at_the_peak


@pytest.mark.parametrize(
    ("length", "rising", "fraction", "warned"),
    [
        (100, 100, None, True),
        (100, 250, None, True),
        (100, 99, None, False),
        (100, 0, None, False),
        (9, 10, 0.1, False),
    ],
)
@pytest.mark.parametrize("unit", ["samples", "iters"])
def test_warm_up(unit: str, length: int, rising: int, fraction: float | None, warned: bool) -> None:
    none = {"train_samples": None, "train_iters": None, "lr_warmup_samples": 0, "lr_warmup_iters": 0}
    given = {f"train_{unit}": length, f"lr_warmup_{unit}": rising, "lr_warmup_fraction": fraction}
    said = never_at_the_peak(Namespace(**none | given))
    expected = (
        f"WARNING: train_{unit}={length} ends within lr_warmup_{unit}={rising}, so the learning rate never reaches"
    )
    assert (said or "").startswith(expected) == warned
    assert (said is None) != warned
