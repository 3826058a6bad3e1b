"""The batch sizes of a run, of which `step_batch_size_schedule` sets several, and what they come to."""

from argparse import Namespace
from itertools import pairwise

from megatron_fc.errors import UserError


def batch_sizes(args: Namespace) -> list[tuple[int, int]]:
    """Sample from which a batch size holds, and the batch in sequences, in order; the first from 0.

    Args:
        args: Megatron's, validated or not.
    """
    if args.step_batch_size_schedule is None:
        return [(0, args.global_batch_size)]
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    read = StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, args.step_batch_size_schedule, args.seq_length)
    return list(read.schedule)


def steps_and_samples(args: Namespace) -> tuple[int, int]:
    """Optimizer steps of a whole run, and the samples that they train.

    Megatron leaves out what does not fill a last batch; with a schedule it fills it.

    Raises:
        UserError: not one batch is filled.
    """
    sizes = batch_sizes(args)
    if len(sizes) == 1 and not args.step_batch_size_schedule:
        steps = args.train_iters or args.train_samples // args.global_batch_size
        if not steps:
            raise UserError(
                f"train_samples={args.train_samples} is less than one batch, global_batch_size="
                f"{args.global_batch_size}: set more samples"
            )
        return steps, steps * args.global_batch_size
    steps = samples = 0
    for (_, batch), (until, _) in pairwise([*sizes, (None, 0)]):
        ends = [end for end in (until, args.train_samples) if end is not None]
        count = max(-(-(min(ends) - samples) // batch), 0) if ends else args.train_iters
        if args.train_iters:
            count = min(count, args.train_iters - steps)
        steps, samples = steps + count, samples + count * batch
    return steps, samples
