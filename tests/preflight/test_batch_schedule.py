"""Steps and samples of a run with several batch sizes, against Megatron's own calculator, step by step."""

from argparse import Namespace

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_fc.preflight.batch_schedule import batch_sizes, steps_and_samples


@pytest.mark.parametrize("schedule", ["0:4", "0:4 1K:8", "0:4 320:6 336:8 2K:2", "0:8 32:4 48:6"])
@pytest.mark.parametrize("end", [{"train_samples": 1}, {"train_samples": 131}, {"train_iters": 7}, {"train_iters": 40}])
def test_megatron_comes_to_the_same(schedule: str, end: dict[str, int]) -> None:
    args = Namespace(train_samples=None, train_iters=None, step_batch_size_schedule=schedule, seq_length=16)
    vars(args).update(end)
    calculator = StepBatchsizeNumMicroBatchesCalculator(2, 1, False, 1, schedule, 16)
    steps = samples = 0
    while samples < args.train_samples if args.train_samples else steps < args.train_iters:
        calculator.update(samples, consistency_check=False)
        steps, samples = steps + 1, samples + calculator.get_current_global_batch_size()
    assert steps_and_samples(args) == (steps, samples)


def test_one_batch_size_leaves_out_the_rest() -> None:
    args = Namespace(train_samples=131, train_iters=None, step_batch_size_schedule=None, global_batch_size=8)
    assert batch_sizes(args) == [(0, 8)]
    assert steps_and_samples(args) == (16, 128)
