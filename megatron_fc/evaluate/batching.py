"""Requests by length: what runs together is of like length, the longest first, so that memory fails at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """Requests that all replicas run at once.

    Attributes:
        numbers: of the requests, the longest first.
        size: how many of them a batch has.
    """

    numbers: tuple[int, ...]
    size: int


def rounds(lengths: Sequence[int], tokens: int, batches: int) -> Iterator[Round]:
    """Share requests out to rounds.

    Args:
        lengths: of the requests, in tokens.
        tokens: that a batch may have, padding included; one request is a batch in any case.
        batches: of a round.
    """
    left = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while left:
        size = min(max(1, tokens // max(1, lengths[left[0]])), -(-len(left) // batches))
        yield Round(tuple(left[: size * batches]), size)
        left = left[size * batches :]
