"""`megatron-fc` commands as a user gives them, each in a fork of a process that has imported Megatron and ModelOpt."""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

# The fork server imports this file by its name, pytest the test files: all that is heavy is imported in the server.
if "forkserver" in str(getattr(sys, "orig_argv", "")):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_fc.megatron import cpu

        cpu.install()
        import megatron.training  # noqa: F401
        import modelopt.torch.distill
        import modelopt.torch.quantization  # noqa: F401


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int | None
    printed: str


def run(folder: Path, *words: object, timeout: float = 200.0) -> Done:
    """Run a command with its output in a file below `folder`; after `timeout` seconds its code is None."""
    output = folder / f"output{len(list(folder.glob('output*')))}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["commands"])
    paths = [str(Path(__file__).parent), *sys.path]
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.12.3 the server does not take this process's path over.
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    # No daemon: Megatron's checkpoint writer is its child.
    process = context.Process(target=_entry, args=(output, [str(word) for word in words]))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        return Done(None, output.read_text())
    return Done(process.exitcode, output.read_text())


def _entry(output: Path, words: Sequence[str]) -> None:
    import traceback

    from megatron_fc.cli import main

    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        code = main(words)
    except BaseException:
        traceback.print_exc()
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
