"""Runs a function on several ranks: forked after one import, real process groups over gloo, a timeout, every traceback.

A fork server imports Megatron once; a rank is then a fork, so a case takes as long as its own work. Functions to run
live in `ranks.py` and get `rank`-independent arguments; what they return comes back in the order of the ranks.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from support.patience import PATIENCE

_TESTS = Path(__file__).parents[1]
# What the fork server and its ranks import from.
_PATHS = [str(_TESTS), str(_TESTS.parent / "benchmarks"), str(_TESTS.parent)]
sys.path += [path for path in _PATHS if path not in sys.path]  # the ranks take this process's path over
_GRACE_SECONDS = 5.0


def run(function: str, world: int, folder: Path, *args: Any) -> list[Any]:
    """Call `ranks.<function>(*args)` on `world` ranks and return their results.

    Args:
        function: name of a function in `ranks.py`.
        world: number of ranks.
        folder: an empty or new folder for rendezvous, results and tracebacks.

    Raises:
        AssertionError: a rank failed or hangs; all ranks of this call are killed. The message holds every rank's
            traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = _fork_server()
    processes = [
        # Not daemons: Megatron's checkpoint writer is a child of the rank.
        context.Process(target=_entry, args=(function, rank, world, folder, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    _wait(processes)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
    if failed:
        raise AssertionError(_report(function, processes, folder))
    return [pickle.loads((folder / f"rank{rank}.result").read_bytes()) for rank in range(world)]


def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Set before torch is imported there: one thread per rank, and no compiler (`megatron_fc.training.cpu_lane`).
    os.environ.update({"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"})
    context.set_forkserver_preload(["support.harness", "support.ranks"])
    # Before Python 3.12.3 the server does not take this process's path over: it would find neither and say nothing.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(_PATHS), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _wait(processes: list[Any]) -> None:
    """Until all ranks have ended; when one has failed the others hang in a collective and get a short grace."""
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.01)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _report(function: str, processes: list[Any], folder: Path) -> str:
    lines = [f"{function} failed on {len(processes)} ranks"]
    for rank, process in enumerate(processes):
        path = folder / f"rank{rank}.error"
        what = path.read_text() if path.exists() else "no traceback: killed or ended without a word"
        lines.append(f"--- rank {rank}, exit code {process.exitcode}: {what if process.exitcode else 'done'}")
    return "\n".join(lines)


def _entry(function: str, rank: int, world: int, folder: Path, args: tuple[Any, ...]) -> None:
    import traceback

    from support import ranks

    try:
        with contextlib.suppress(FileNotFoundError), open(folder / f"rank{rank}.log", "w") as log:
            sys.stdout = sys.stderr = sys.__stdout__ = log  # type: ignore[misc]
            result = ranks.on_rank(getattr(ranks, function), rank, world, folder / "store", args)
            (folder / f"rank{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
        code = 1
    # Megatron's checkpoint helper may block TERM, as a rank does that saves when it is told to end.
    for child in multiprocessing.active_children():
        child.kill()
    # Without the interpreter's shutdown, in which gloo's threads and Megatron's writers may wait for each other.
    os._exit(code)
