"""Start the tests of the kernels in a process of their own, where Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import fork_server

HERE = Path(__file__).parent


QUICK = ("test_traffic.py",)
IN_MEGATRON = ("test_model.py", "test_observers.py", "test_layouts_with_kernels.py")
SLOW = ("test_operations.py", *IN_MEGATRON)


@pytest.mark.parametrize("module", [*QUICK, *(pytest.param(module, marks=pytest.mark.slow) for module in SLOW)])
def test_in_interpreter(module: str) -> None:
    interpret(module, "not soak")


@pytest.mark.soak
@pytest.mark.parametrize("module", ["test_operations.py", "test_model.py", "test_layouts_with_kernels.py"])
def test_more_in_interpreter(module: str) -> None:
    interpret(module, "soak")


def interpret(module: str, selected: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", selected]
    python = fork_server.python(TRITON_INTERPRET="1") if module in IN_MEGATRON else sys.executable
    command = [python, "-m", "pytest", *options, str(HERE / module)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2])
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
