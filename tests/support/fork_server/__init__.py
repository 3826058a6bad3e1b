"""A Python that starts at once: a fork of a server that has imported torch and Megatron on the CPU lane.

`python()` is the path of a program to put in the place of `sys.executable`, in a test's command line or in a site file.
What it runs is a process of its own, with the arguments, environment, directory, files and namespaces that the program
was given, real signals and a real exit code; only the imports are those of the server. `client.py` and `server.py` say
how. Where Python's start itself is tested, and on GPUs, `sys.executable` is the one to use.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_TESTS = _HERE.parents[1]
# Where the server's Python looks for what it imports, and its processes for what their environment does not name.
PATHS = [str(_TESTS.parent), str(_TESTS), str(_TESTS.parent / "benchmarks")]
# What torch, Triton and Megatron read when they are imported: the same for all processes of a server.
READ_ON_IMPORT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0"}
# pyarrow, which datasets and thereby ModelOpt import, would start a thread, and what has threads must not fork.
_WITHOUT_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_FOLDER, _OWNER = "FORK_SERVER_FOLDER", "FORK_SERVER_OWNER"


def begin() -> None:
    """Make the folder of this session of tests, unless the process that started this one has: then they share it."""
    if _FOLDER not in os.environ:
        os.environ |= {_FOLDER: tempfile.mkdtemp(prefix="fork-server-"), _OWNER: str(os.getpid())}


def end() -> None:
    """Remove what `begin` made in this process; the servers end with it."""
    if os.environ.get(_OWNER) == str(os.getpid()):
        shutil.rmtree(os.environ[_FOLDER])


def python(**values: str) -> str:
    """The program's path; its server is started if there is none yet.

    Args:
        values: of READ_ON_IMPORT; those of this process's environment, or else the usual ones, where none is given.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return sys.executable  # a process that has looked for GPUs must not fork
    values = {name: os.environ.get(name, usual) for name, usual in READ_ON_IMPORT.items()} | values
    folder = Path(os.environ[_FOLDER], "-".join(values.values()))
    program = folder / "python"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            folder.mkdir()
            _start(folder, values)
            facts = {"python": sys.executable, "server": str(folder / "socket"), "values": values}
            (folder / "client.json").write_text(json.dumps(facts))
            program.write_text(f"#!{sys.executable} -IS\n{(_HERE / 'client.py').read_text()}")
            program.chmod(0o755)
    return str(program)


def process_id(process: subprocess.Popen[Any]) -> int:
    """The number of what runs for a process that was started as `python()`: the program's own is another one."""
    return int(Path(process.args[0]).with_name(f"{process.pid}.pid").read_text())


def _start(folder: Path, values: dict[str, str]) -> None:
    """It imports while this process goes on, and ends with the session's first process."""
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    with open(folder / "log", "w") as log, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(64)
        subprocess.Popen(
            [sys.executable, _HERE / "server.py", str(listening.fileno()), os.environ[_OWNER], folder],
            env={**os.environ, **values, **_WITHOUT_THREADS, "PYTHONPATH": path},
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
