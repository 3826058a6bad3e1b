"""A learning rate that never reaches its peak, as in a run shorter than the config's that keeps its warm-up."""

from argparse import Namespace


def never_at_the_peak(args: Namespace) -> str | None:
    """Return a warning in words if the run ends while its learning rate still rises, None otherwise.

    Args:
        args: Megatron's, parsed.
    """
    unit = "samples" if args.train_samples else "iters"
    length, rising = getattr(args, f"train_{unit}"), getattr(args, f"lr_warmup_{unit}")
    if not length or not rising or args.lr_warmup_fraction is not None or rising < length:
        return None
    return (
        f"WARNING: train_{unit}={length} ends within lr_warmup_{unit}={rising}, so the learning rate never reaches its "
        f"peak: set lr_warmup_{unit} and lr_decay_{unit} with it"
    )
