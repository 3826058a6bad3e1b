"""A clock of steps that tells a hang from a step that takes long, and the place where a rank stands."""

import functools
import sys
import threading
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SILENT = "without an answer"
# Of the timeout of collectives. At that itself every rank fails, and none can tell which one kept the others waiting.
_SHARE = 0.8
_NAMED = 3


class StepClock:
    """Measures how long this rank has begun no micro-batch and no iteration.

    Args:
        args: Megatron's arguments: its timeouts of collectives, and the iteration that it trains.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._micro_batches = 0
        self._first: int | None = None  # iteration that this process has trained; before it some may be skipped
        self._seen: tuple[int, int | None] | None = None
        self._since = time.monotonic()

    def count(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return Megatron's `forward_step`, with its calls counted."""

        @functools.wraps(forward_step)
        def counted(*args: Any, **options: Any) -> Any:
            self._micro_batches += 1
            if self._first is None:
                self._first = getattr(self._args, "curr_iteration", None)
            return forward_step(*args, **options)

        return counted

    def seconds(self) -> float:
        """Return the seconds since this method saw the last step; it is called about once a second."""
        # With CUDA graphs of whole iterations, Megatron calls `forward_step` for the first ones alone.
        now = self._micro_batches, getattr(self._args, "curr_iteration", None)
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        return time.monotonic() - self._since

    @property
    def limit(self) -> float:
        """Seconds without a step that are a hang: 80% of what Megatron lets a collective take."""
        later = self._args.distributed_timeout_seconds_after_init  # Megatron sets it after the first iteration
        if later is not None and self._first is not None and self._args.curr_iteration > self._first:
            return _SHARE * float(later)
        return _SHARE * 60 * float(self._args.distributed_timeout_minutes)


def place() -> str:
    """Return where the main thread stands: its innermost Python frame."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def describe(places: dict[str, str]) -> str:
    """Say where the ranks stand, those without an answer first, then the odd ones out: they keep the others waiting.

    Args:
        places: by the ranks' names; SILENT or what `place` says.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, at in places.items():
        groups[at].append(name)
    ordered = sorted(groups.items(), key=lambda group: (group[0] != SILENT, len(group[1])))
    return "; ".join(
        f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''} {at}"
        for at, names in ordered[:_NAMED]
    )
