"""Counts among a run's settings that cannot be 0: Megatron divides by them, loops over them or crashes on them."""

import re
from argparse import Namespace

from megatron_fc.errors import UserError
from megatron_fc.training.megatron_arguments import megatron_arguments

_COUNTS = re.compile(
    r".*_(interval|size)|num_(layers|attention_heads|query_groups)|moe_router_topk|kv_channels|seed"
    r"|(encoder_|decoder_)?seq_length|max_position_embeddings|train_(iters|samples)"
)
_LEFT_OUT_BY = {"eval_interval": "eval_iters=0 leaves validation out"}


def refuse_small_counts(args: Namespace) -> None:
    """Check that counts are at least 1; 0 has a meaning where it is the default.

    Args:
        args: Megatron's, parsed.

    Raises:
        UserError: one is smaller.
    """
    for name, value in vars(args).items():
        if not _COUNTS.fullmatch(name) or not isinstance(value, int) or isinstance(value, bool):
            continue
        default = megatron_arguments().default(name)
        least = 0 if default == 0 else 1
        if value < least and value != default:
            way_out = _LEFT_OUT_BY.get(name, "null leaves it out" if default is None else f"the default is {default}")
            raise UserError(f"{name}={value} must be at least {least}; {way_out}")
