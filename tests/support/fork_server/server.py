"""The server: imports torch and Megatron once, and becomes, in a fork, every process that a client asks for.

python server.py SOCKET OWNER FOLDER

SOCKET is the number of an open file that listens. The server ends with the process OWNER. In FOLDER it notes the number
of the process that runs for a client, in a file with the client's number. It has one thread: a process with more must
not fork.
"""

import argparse
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import process

from support.touched import watch

_SIGNALS = signal.valid_signals()
_JOINED = ("mnt", "uts", "net", "ipc")  # namespaces that a process can enter by itself
_PEER = struct.Struct("3i")  # process, user, group


@dataclass
class Started:
    """A process, as the server sees it."""

    pid: int
    client: socket.socket
    end: int  # readable when it has ended


def import_what_is_slow() -> dict[str, str]:
    """All that commands and ranks would import one after the other; returns what that has set in the environment.

    The CPU lane is for a process itself to install.
    """
    before = set(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import multiprocessing.spawn  # noqa: F401  which keeps the real Python: it hands files on to what it starts

        import megatron.core.tokenizers.text
        import megatron.training.arguments
        import megatron.training.training
        import tensorboard.backend.event_processing.event_accumulator  # noqa: F401
        import torch.utils.tensorboard  # noqa: F401

        import megatron_fc.cli.main
        import megatron_fc.megatron.specs
        import megatron_fc.profiling.profile
        import megatron_fc.training.batches
        import megatron_fc.training.loop  # noqa: F401
        import support.megatron_parser  # noqa: F401

        megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())  # its sources are remembered now
        if find_spec("modelopt") is not None:
            import modelopt.torch.distill
            import modelopt.torch.quantization  # noqa: F401
    return {name: value for name, value in os.environ.items() if name not in before}


class Server:
    """Forks for every client.

    Args:
        listening: where they connect.
        owner: the process that it ends with.
        notes: the folder of their processes' numbers.
    """

    def __init__(self, listening: socket.socket, owner: int, notes: Path) -> None:
        self._listening, self._notes = listening, notes
        self._events = selectors.DefaultSelector()
        self._events.register(listening, selectors.EVENT_READ)
        self._events.register(os.pidfd_open(owner), selectors.EVENT_READ)

    def serve(self) -> tuple[dict[str, Any], list[int]] | None:
        """Until the owner has ended; returns None then, and in a new process what it is to be, and its files."""
        while True:
            for key, _ in self._events.select():
                started: Started | None = key.data
                if key.fileobj is self._listening:
                    if (job := self._start()) is not None:
                        return job
                elif started is None:
                    return None
                elif key.fileobj == started.end:
                    self._report_end(started)
                elif started.client.fileno() >= 0:  # else its end was reported just now
                    self._hand_on(started)

    def _start(self) -> tuple[dict[str, Any], list[int]] | None:
        client, _ = self._listening.accept()
        request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if not request:  # it was killed
            client.close()
            return None
        peer, _, _ = _PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = fork_into_namespaces(peer)
        os.setpgid(pid, pid)  # both do, as either may be the first to need it
        if pid == 0:
            self._events.close()
            return json.loads(request), files
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        (self._notes / f"{peer}.pid").write_text(str(pid))
        for file in files:
            os.close(file)
        started = Started(pid, client, os.pidfd_open(pid))
        self._events.register(client, selectors.EVENT_READ, started)
        self._events.register(started.end, selectors.EVENT_READ, started)
        return None

    def _hand_on(self, started: Started) -> None:
        """Send the process, and all that it has started, as launchers do, the signals that its client got.

        KILL if the client was killed.
        """
        numbers = b""
        with contextlib.suppress(ConnectionError):
            numbers = started.client.recv(16)
        for number in numbers or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, number)
        if not numbers:
            self._events.unregister(started.client)

    def _report_end(self, started: Started) -> None:
        _, status = os.waitpid(started.pid, 0)
        for file in (started.client, started.end):
            with contextlib.suppress(KeyError):
                self._events.unregister(file)
        with contextlib.suppress(OSError):
            started.client.send(str(status).encode())
        started.client.close()
        os.close(started.end)


def fork_into_namespaces(peer: int) -> int:
    """Fork; the new process is in the namespaces of another one, as those of a cluster's node."""
    theirs, ours = (os.readlink(f"/proc/{number}/ns/pid") for number in (peer, "self"))
    if theirs == ours:
        return os.fork()
    with contextlib.ExitStack() as stack:
        files = {name: os.open(f"/proc/{peer}/ns/{name}", os.O_RDONLY) for name in ("pid", *_JOINED)}
        files["own"] = os.open("/proc/self/ns/pid", os.O_RDONLY)
        for file in files.values():
            stack.callback(os.close, file)
        os.setns(files["pid"])  # holds for new processes
        pid = os.fork()
        for name in _JOINED if pid == 0 else ("own",):
            os.setns(files[name])
        return pid


if __name__ == "__main__":
    number, owner, folder = sys.argv[1:]
    watch()
    set_on_import = import_what_is_slow()
    assert len(os.listdir("/proc/self/task")) == 1, "threads"
    gc.collect()
    gc.freeze()  # or the first collection in a fork would copy all pages
    job = Server(socket.socket(fileno=int(number)), int(owner), Path(folder)).serve()
    if job is not None:
        request, files = job
        process.become(files, set_on_import, **request)
