"""Helper processes end with the process that started them.

Megatron writes checkpoints in helpers of several hundred megabytes. Multiprocessing ends them when their rank ends by
itself, but not when it is killed: they would hold its memory, its pipes and its connections, so that launchers wait for
them, or outlive the job where nothing else ends them. The system ends them instead, by PR_SET_PDEATHSIG.
"""

import ctypes
import multiprocessing
import multiprocessing.spawn
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_parent: int | None = None  # of the fork that is under way
_bound = False


class _Bound:
    """Travels in what a spawned process reads first, and takes effect where it is unpickled."""

    def __reduce__(self) -> Any:
        return _begin, (os.getpid(), getattr(sys.stderr, "path", None))


def _begin(parent: int, log: Path | None) -> None:
    if os.getppid() == parent:
        end_with(parent)
    else:  # of Megatron's checkpoint worker the parent is a server of forks
        threading.Thread(target=_end_with_starter, daemon=True, name="end with starter").start()
        bind_helpers()
    if log is not None:
        with suppress(OSError):
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)


def _end_with_starter() -> None:
    while (starter := multiprocessing.parent_process()) is None:  # who is named a little later
        time.sleep(0.1)
    starter.join()
    os.kill(os.getpid(), signal.SIGKILL)


def bind_helpers() -> None:
    """From now on, what this process forks, or spawns by multiprocessing, ends with it, and so do their helpers.

    What is spawned writes into the log of this process, where it has one (`megatron_fc.runs.rank_log`).
    Only what the main thread starts: the system goes by the thread, and the others may end before.
    """
    global _bound
    if _bound:
        return
    _bound = True
    os.register_at_fork(before=_remember, after_in_child=_end_with_remembered)
    prepare = multiprocessing.spawn.get_preparation_data

    def with_parent(name: str) -> dict[str, Any]:
        data = prepare(name)
        return data | {"bound": _Bound()} if _is_main_thread() else data

    multiprocessing.spawn.get_preparation_data = with_parent


def end_with(parent: int) -> None:
    """Let this process be killed when its parent ends, at once if that has happened already."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    bind_helpers()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _remember() -> None:
    global _parent
    _parent = os.getpid() if _is_main_thread() else None


def _end_with_remembered() -> None:
    if _parent is not None:
        end_with(_parent)
