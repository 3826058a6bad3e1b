"""Helpers of a process that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.patience import PATIENCE

_PROGRAM = """
import multiprocessing, os, sys, threading, time
from megatron_fc.resilience.helpers import bind_helpers

def helper(file):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))  # a helper's helper
    child.start()
    file.send([os.getpid(), child.pid])
    time.sleep(3600)

if __name__ == "__main__":
    bind_helpers()
    hears, says = multiprocessing.Pipe(duplex=False)
    multiprocessing.get_context(sys.argv[1]).Process(target=helper, args=(says,)).start()
    manager = multiprocessing.get_context(sys.argv[1]).Manager()  # as Megatron's queue of written files
    print(*hears.recv(), manager._process.pid, flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_they_end_with_it(method: str, tmp_path: Path) -> None:
    """And their own helpers; their pipes close, for which a launcher may wait."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    variables = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(
        [sys.executable, program, method], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables, text=True
    ) as process:
        assert process.stdout is not None
        helpers = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
        assert len(helpers) == 3
        process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(helpers, timeout=PATIENCE)
        assert not alive
        assert process.stdout.read() == ""
