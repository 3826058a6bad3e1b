"""Runs a function on several ranks: real processes and process groups over gloo, a timeout, every traceback.

A rank is a fork of a process that has imported Megatron (`fork_server`), so a case takes as long as its own work.
Functions to run live in `ranks.py` and get `rank`-independent arguments; what they return comes back in the order of
the ranks.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from support import fork_server
from support.patience import PATIENCE

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
    (folder / "arguments").write_bytes(pickle.dumps(args))
    words = [fork_server.python(), "-m", "support.harness", function, str(folder), str(world)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(fork_server.PATHS)}
    processes = [subprocess.Popen([*words, str(rank)], env=variables) for rank in range(world)]
    _wait(processes)
    if any(process.returncode != 0 for process in processes):
        raise AssertionError(_report(function, processes, folder))
    return [pickle.loads((folder / f"rank{rank}.result").read_bytes()) for rank in range(world)]


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all ranks have ended; when one has failed the others hang in a collective and get a short grace."""
    deadline = time.monotonic() + PATIENCE
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait()


def _report(function: str, processes: list[subprocess.Popen[bytes]], folder: Path) -> str:
    lines = [f"{function} failed on {len(processes)} ranks"]
    for rank, process in enumerate(processes):
        path = folder / f"rank{rank}.error"
        what = path.read_text() if path.exists() else "no traceback: killed or ended without a word"
        lines.append(f"--- rank {rank}, exit code {process.returncode}: {what if process.returncode else 'done'}")
    return "\n".join(lines)


def _rank(function: str, folder: Path, world: int, rank: int) -> None:
    """What one of the processes does."""
    from support import ranks

    try:
        with open(folder / f"rank{rank}.log", "w") as log:
            sys.stdout = sys.stderr = sys.__stdout__ = log  # type: ignore[misc]
            args = pickle.loads((folder / "arguments").read_bytes())
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


if __name__ == "__main__":
    _rank(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
