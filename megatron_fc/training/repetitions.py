"""A few tokens that repeat many times in a row, which OLMoE (arXiv 2409.02060) keeps out of its data and its loss."""

from argparse import ArgumentParser
from typing import Any

import numpy as np

MAX_PERIOD = 13  # tokens
MIN_REPETITIONS = 32


def repeats(ids: np.ndarray[Any, Any], max_period: int = MAX_PERIOD, times: int = MIN_REPETITIONS) -> bool:
    """Return whether 1 to `max_period` tokens stand `times` times or more in a row.

    They do where (times - 1) * period tokens in a row equal those one period before.

    Args:
        ids: [n], of any integer type.
    """
    for period in range(1, min(max_period, ids.size // times) + 1):
        different = np.flatnonzero(ids[period:] != ids[:-period])
        ends = np.concatenate(([-1], different, [ids.size - period]))
        if int(np.diff(ends).max()) - 1 >= (times - 1) * period:
            return True
    return False


def add_repetition_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flag `--mask-repetitions`, which `TokenDataset` obeys."""
    parser.add_argument_group(title="repetitions").add_argument(
        "--mask-repetitions",
        action="store_true",
        help=f"Leave samples out of the loss in which 1 to {MAX_PERIOD} tokens stand {MIN_REPETITIONS} times in a row.",
    )
    return parser
