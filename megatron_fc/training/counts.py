"""Counts among a run's settings.

Some cannot be 0: Megatron divides by them, loops over them or crashes on them. Those of its schedule are all of
iterations or all of samples.
"""

import re
from argparse import Namespace

from megatron_fc.errors import UserError
from megatron_fc.training.megatron_arguments import megatron_arguments

_COUNTS = re.compile(
    r".*_(interval|size)|num_(layers|attention_heads|query_groups)|moe_router_topk|kv_channels|seed"
    r"|(encoder_|decoder_)?seq_length|max_position_embeddings|train_(iters|samples)"
)
_SCHEDULE = ("train", "lr_decay", "lr_warmup")
_LEFT_OUT_BY = {"eval_interval": "eval_iters=0 leaves validation out"}


def refuse_wrong_counts(args: Namespace) -> None:
    """Check that counts are at least 1, where 0 has no meaning as the default, and that there are experts enough.

    Args:
        args: Megatron's, parsed.

    Raises:
        UserError: one is smaller, or there are fewer experts than a token is sent to.
    """
    for name, value in vars(args).items():
        if not _COUNTS.fullmatch(name) or not isinstance(value, int) or isinstance(value, bool):
            continue
        default = megatron_arguments().default(name)
        least = 0 if default == 0 else 1
        if value < least and value != default:
            way_out = _LEFT_OUT_BY.get(name, "null leaves it out" if default is None else f"the default is {default}")
            raise UserError(f"{name}={value} must be at least {least}; {way_out}")
    if args.num_experts and args.moe_router_topk > args.num_experts:
        raise UserError(
            f"moe_router_topk={args.moe_router_topk}: there are num_experts={args.num_experts}, set at most that many"
        )


def refuse_two_units(args: Namespace) -> None:
    """Check that a run's schedule counts iterations or samples, not both.

    Args:
        args: Megatron's, parsed.

    Raises:
        UserError: it counts both, or counts the learning rate in the other unit.
    """
    if args.skip_train or not (args.train_iters or args.train_samples):
        return
    iters, samples = (
        [f"{name}_{unit}" for name in _SCHEDULE if getattr(args, f"{name}_{unit}")] for unit in ("iters", "samples")
    )
    if args.train_iters and args.train_samples:
        batch = args.global_batch_size
        as_samples = f"={args.train_iters * batch}" if batch else " to their product with the batch size"
        raise UserError(
            f"train_iters={args.train_iters} and train_samples={args.train_samples} are both set: "
            + ("" if iters[1:] else f"set train_samples{as_samples} for these iterations and drop train_iters, or ")
            + f"set {'=null '.join(samples)}=null and the learning rate's schedule in iterations, lr_decay_iters and "
            f"lr_warmup_iters"
        )
    kept, other = ("iters", samples) if args.train_iters else ("samples", iters)
    if other:
        said = " and ".join(f"{name}={getattr(args, name)}" for name in other)
        raise UserError(
            f"train_{kept}={getattr(args, f'train_{kept}')} and {said} count in two units: set {'=null '.join(other)}="
            f"null and {' and '.join(f'{name.rpartition("_")[0]}_{kept}' for name in other)}"
        )
