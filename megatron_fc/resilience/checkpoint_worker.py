"""The process that writes a rank's checkpoints while training goes on (`async_save`), and what happens when it ends.

Megatron never looks whether it still runs: without it training goes on without checkpoints, until the rank waits for
the worker for ever. The system ends it where memory runs out, and an error while it writes several files.

In turn it holds up a rank that ends before its target, as those do that load data: Python sends its helpers TERM and
waits for them for ever, for like every process of a rank they do not hear TERM (`megatron_fc.resilience.run_record`).
"""

import multiprocessing
import signal
from argparse import Namespace
from multiprocessing.connection import wait
from typing import Any

from megatron_fc.callbacks import Callback

_LOOKS = 3  # Megatron forgets a worker right after it has let it end


class CheckpointWorker(Callback):
    """Tells when this rank's worker is lost, and lets no helper hold up the rank's end.

    Args:
        args: Megatron's arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._ended: Any = None
        self._seen = 0
        self._is_over = False
        self._others = {child.pid for child in multiprocessing.active_children()}  # of whoever calls the run

    def lost(self) -> str | None:
        """How the worker has ended in the middle of the run, None while it runs or where there is none.

        Called about once a second, on a thread that then ends the process.
        """
        worker = None if self._is_over else self._worker()
        if worker is None or not _has_ended(worker):
            self._seen = 0
            return None
        self._seen = self._seen + 1 if worker is self._ended else 1
        self._ended = worker
        if self._seen < _LOOKS:
            return None
        code = worker.exitcode
        ended = f"ended with code {code}, as the log of that rank says"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else ended
        return f"the process that writes the checkpoints of rank {self._args.rank} {how}"

    def end(self) -> None:
        self._is_over = True
        # Megatron ends a worker that has written, and leaves one that has not.
        own = (child for child in multiprocessing.active_children() if child.pid not in self._others)
        _kill([child for child in own if child.daemon])

    def failed(self, error: BaseException) -> BaseException:
        self.end()
        return error

    def _worker(self) -> Any:
        if not self._args.async_save or self._args.async_strategy != "mcore":
            return None
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        return PersistentAsyncCaller._persistent_process


def _kill(helpers: list[Any]) -> None:
    # torch hears of a child's end, and raises an error if it loaded data.
    heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for helper in helpers:
        helper.kill()
    for helper in helpers:
        helper.join()
    signal.signal(signal.SIGCHLD, heard or signal.SIG_DFL)


def _has_ended(worker: Any) -> bool:
    # Asked itself, it would read how it ended, which can be read once: the main thread may be about to.
    try:
        return bool(wait([worker.sentinel], 0))
    except (OSError, ValueError):  # closed: Megatron has let it end
        return False
