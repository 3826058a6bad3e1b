"""The server: imports torch and Megatron once, and becomes, in a fork, every process that a client asks for.

python server.py SOCKET PID FOLDER    # an open file that listens; the server ends with the process PID

In FOLDER it notes the number of the process for every client, in a file of the client's number.

One thread: a process with more must not fork.
"""

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import runpy
import selectors
import signal
import site
import socket
import struct
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OWN_PATHS = os.environ["PYTHONPATH"].split(os.pathsep)
_JOINED = ("mnt", "uts", "net", "ipc")  # namespaces that a process can enter by itself


@dataclass
class Started:
    """A process, as the server sees it."""

    pid: int
    client: socket.socket
    end: int  # readable when it has ended


def import_what_is_slow() -> dict[str, str]:
    """All that commands and ranks would import one after the other; returns what that has set in the environment."""
    before = set(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_fc.training import cpu_lane

        cpu_lane.install()

        from support import ranks  # noqa: F401

        if importlib.util.find_spec("modelopt") is not None:
            import modelopt.torch.distill
            import modelopt.torch.quantization  # noqa: F401
    return {name: value for name, value in os.environ.items() if name not in before}


def serve(listening: socket.socket, owner: int, notes: Path) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for every client until the owner has ended; returns None then, and in a new process what it is to be."""
    events = selectors.DefaultSelector()
    events.register(listening, selectors.EVENT_READ)
    events.register(os.pidfd_open(owner), selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            started: Started | None = key.data
            if key.fileobj == listening:
                client, _ = listening.accept()
                message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
                if not message:
                    client.close()
                    continue
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                peer, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                pid = _fork(peer)
                os.setpgid(pid, pid or os.getpid())  # by both, as either may be the first to need it
                if pid == 0:
                    events.close()
                    return json.loads(message), files
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
                (notes / str(peer)).write_text(str(pid))
                for file in files:
                    os.close(file)
                started = Started(pid, client, os.pidfd_open(pid))
                events.register(client, selectors.EVENT_READ, started)
                events.register(started.end, selectors.EVENT_READ, started)
            elif started is None:
                return None
            elif key.fileobj is started.client:
                _hand_on(started, events)
            else:
                _report_end(started, events)


def _fork(peer: int) -> int:
    """Fork into the namespaces of the client's process, if it has others than the server."""
    theirs, ours = (os.readlink(f"/proc/{process}/ns/pid") for process in (peer, "self"))
    if theirs == ours:
        return os.fork()
    with contextlib.ExitStack() as stack:
        files = {name: os.open(f"/proc/{peer}/ns/{name}", os.O_RDONLY) for name in ("pid", *_JOINED)}
        files["own"] = os.open("/proc/self/ns/pid", os.O_RDONLY)
        for file in files.values():
            stack.callback(os.close, file)
        os.setns(files["pid"])
        pid = os.fork()
        if pid == 0:
            for name in _JOINED:
                os.setns(files[name])
        else:
            os.setns(files["own"])
        return pid


def _hand_on(started: Started, events: selectors.BaseSelector) -> None:
    """A signal that the client got, to the process and all that it has started, as a launcher sends it; KILL when the
    client was killed.
    """
    try:
        numbers = started.client.recv(16) or bytes([signal.SIGKILL])
    except ConnectionError:
        numbers = bytes([signal.SIGKILL])
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, number)
        if number == signal.SIGKILL:
            events.unregister(started.client)


def _report_end(started: Started, events: selectors.BaseSelector) -> None:
    _, status = os.waitpid(started.pid, 0)
    events.unregister(started.end)
    os.close(started.end)
    with contextlib.suppress(KeyError, ValueError):
        events.unregister(started.client)
    with contextlib.suppress(OSError):
        started.client.send(str(status).encode())
    started.client.close()


def become(request: dict[str, Any], files: list[int], set_on_import: dict[str, str]) -> None:
    """Run what `python ARGUMENTS` would, in this process."""
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    os.umask(request["umask"])
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(set_on_import | request["environment"])
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    base = [path for path in sys.path[1:] if path not in _OWN_PATHS]
    sys.path[:] = ["", *more, *(path for path in _OWN_PATHS if path and path not in more), *base]
    sys.modules.pop("sitecustomize", None)
    site.execsitecustomize()
    sys.executable = request["argv"][0]
    end(lambda: _run(request["argv"][1:]))


def end(job: Callable[[], None]) -> None:
    """Run the job and end as Python ends, but do not take a million objects down, which would copy all their pages."""
    code: object = 0
    try:
        job()
    except SystemExit as done:
        code = done.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  waits for those that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(words: list[str]) -> None:
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-u":
        words = words[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    match words:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.path[0] = os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path[0] = os.path.dirname(os.path.realpath(script))
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    number, owner, folder = sys.argv[1:]
    listening = socket.socket(fileno=int(number))
    set_on_import = import_what_is_slow()
    assert len(os.listdir("/proc/self/task")) == 1, "threads"
    gc.collect()
    gc.freeze()  # or the first collection in a fork would copy all pages
    job = serve(listening, int(owner), Path(folder))
    if job is not None:
        become(*job, set_on_import)
