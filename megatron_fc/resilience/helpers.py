"""Helper processes end with the process that started them.

Megatron writes checkpoints in helpers of several hundred megabytes. Multiprocessing ends them when their rank ends by
itself, but not when it is killed: they would hold its memory, its pipes and its connections, so that launchers wait for
them, or outlive the job where nothing else ends them. The system ends them instead, by PR_SET_PDEATHSIG.
"""

import ctypes
import multiprocessing.spawn
import os
import signal
import threading
from multiprocessing.connection import wait
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_parent: int | None = None  # of the fork that is under way
_bound = False


class _EndsWithParent:
    """Travels in what a spawned process reads first, and takes effect where it is unpickled."""

    def __reduce__(self) -> Any:
        return end_with, (os.getpid(),)


def bind_helpers() -> None:
    """From now on, what this process forks, or spawns by multiprocessing, ends with it, and so do their helpers.

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
        return data | {"ends_with_parent": _EndsWithParent()} if _is_main_thread() else data

    multiprocessing.spawn.get_preparation_data = with_parent


def end_with(process: int) -> None:
    """Let this process be killed when the other ends, at once if that has happened already."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != process:
        _await_end(process)
    bind_helpers()


def _await_end(process: int) -> None:
    """The same where the other is no parent: of Megatron's checkpoint worker the parent is a server of forks."""
    try:
        other = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)

    def end() -> None:
        wait([other])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True, name="end with parent").start()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _remember() -> None:
    global _parent
    _parent = os.getpid() if _is_main_thread() else None


def _end_with_remembered() -> None:
    if _parent is not None:
        end_with(_parent)
