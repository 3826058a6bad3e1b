"""`megatron-fc` commands as a user gives them, each in a fork of a process that has imported Megatron and ModelOpt."""

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

from megatron_fc.mpi import free_port
from support.patience import PATIENCE

# The fork server imports this file by its name, pytest the test files: all that is heavy is imported in the server.
if "forkserver" in str(getattr(sys, "orig_argv", "")):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_fc.training import cpu_lane

        cpu_lane.install()
        import megatron.training  # noqa: F401
        import modelopt.torch.distill
        import modelopt.torch.quantization  # noqa: F401


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int | None
    printed: str


def run(folder: Path, *words: object, ranks: int = 1) -> Done:
    """Run a command on some ranks, their output in one file below `folder`.

    Returns:
        With the first code that is not 0, None if it hangs.
    """
    output = folder / f"output{len(list(folder.glob('output*')))}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.compress_commands"])
    paths = [str(Path(__file__).parents[1]), *sys.path]
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.12.3 the server does not take this process's path over.
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    arguments = output, [str(word) for word in words]
    # No daemons: Megatron's checkpoint writer is their child.
    processes = [context.Process(target=_entry, args=(*arguments, place)) for place in _places(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode != 0:  # the others wait for it
            break
    code = process.exitcode
    for process in processes:
        process.kill()
    return Done(code, output.read_text())


def _places(ranks: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank; nothing for a lone one."""
    if ranks == 1:
        return [{}]
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in place.items()} for place in places]


def _entry(output: Path, words: Sequence[str], place: dict[str, str]) -> None:
    import traceback

    from megatron_fc.cli.main import main

    os.environ.update(place)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        code = main(words)
    except BaseException:
        traceback.print_exc()
    # Megatron's checkpoint helper may block TERM, as a rank does that saves when it is told to end.
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
