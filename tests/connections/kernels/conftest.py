"""The kernels on CPU tensors: compiled and run in the emulator, and some in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so `test_interpreted.py` runs in a process that sets it before
anything imports the kernels: `test_in_interpreter.py` starts it, and pytest leaves it alone elsewhere.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from laboratory.emulator import Options
from laboratory.emulator.driver import Emulator, emulated
from megatron_fc.connections.kernels import launch
from support import touched

INTERPRETED = "test_interpreted.py"
collect_ignore = [
    file.name
    for file in Path(__file__).parent.glob("test_*.py")
    if (file.name == INTERPRETED) != (os.environ.get("TRITON_INTERPRET") == "1")
]


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """An H100 that watches for races between lanes and for memory that nothing was written to."""

    def noted(name: str, text: str) -> str:
        touched.compiled_from(text)
        return text

    with emulated(90, Options(races="lanes", uninitialised="error")) as emulator:
        emulator.edit = noted
        yield emulator


@pytest.fixture
def general_kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No main kernels, until it is undone."""
    for name in ("main_forward", "main_backward", "main_depth"):
        monkeypatch.setattr(launch, name, lambda *arguments: None)
    return monkeypatch
