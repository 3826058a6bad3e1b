"""`megatron-fc` commands as a user gives them, on one rank or several."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_fc.mpi import free_port
from support import fork_server
from support.patience import PATIENCE


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
    command = [fork_server.python(), "-m", "megatron_fc", *map(str, words)]
    with open(output, "a") as file:
        processes = [
            subprocess.Popen(command, env=os.environ | place, stdout=file, stderr=file) for place in _places(ranks)
        ]
    end = time.monotonic() + PATIENCE
    code: int | None = None
    try:
        for process in processes:
            code = process.wait(max(0.0, end - time.monotonic()))
            if code != 0:  # the others wait for it
                break
    except subprocess.TimeoutExpired:
        code = None
    for process in processes:
        process.kill()
        process.wait()
    return Done(code, output.read_text())


def _places(ranks: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank; nothing for a lone one."""
    if ranks == 1:
        return [{}]
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in place.items()} for place in places]
