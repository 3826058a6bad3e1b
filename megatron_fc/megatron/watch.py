"""All ranks end when one is lost, and say which one it was.

By themselves the survivors of a killed rank wait in a collective: with NCCL for its timeout of ten minutes, with gloo
until a neighbour's connection breaks, which names no rank; under srun nobody else ends them. Here every rank keeps a
connection to the first one. The system closes a dead process's connections at once, so the first rank sees who is
gone and tells the others; if it is the first rank itself, they all see that.
"""

import contextlib
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fc.errors import UserError

# "Temporary failure" of sysexits.h: a scheduler may start the same again.
LOST_RANK_EXIT_CODE = os.EX_TEMPFAIL
_JOIN_SECONDS = 30.0
# A rank that fails in a collective has mostly lost another one, of which it hears within this time.
_VERDICT_SECONDS = 5.0
# A machine without power closes nothing: probes notice after 15 + 3 * 5 seconds.
_PROBES = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_BYE = "bye"


class RankWatch:
    """A context in which the loss of a rank ends all others; errors of this rank's own pass through.

    Args:
        on_loss: told which rank was lost, returns what to do.
    """

    def __init__(self, on_loss: Callable[[str], str]) -> None:
        self._on_loss = on_loss
        self._peers: dict[socket.socket, str] = {}
        self._is_over = False

    def join(self) -> None:
        """Connect the ranks; all of them call it, once Megatron has joined them."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if ranks == 1:
            return
        # A checkpoint writer, forked, would keep the connection of a killed rank open.
        os.register_at_fork(after_in_child=self._close)
        listener = socket.create_server(("", 0), backlog=ranks) if rank == 0 else None
        name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        invitation = [(listener.getsockname()[1] if listener else 0, secrets.token_hex(), name)]
        torch.distributed.broadcast_object_list(invitation, src=0)
        port, secret, name_of_first = invitation[0]
        if listener:
            self._accept(listener, ranks - 1, secret)
        else:
            self._connect(port, name_of_first, f"{secret} {name}")
        torch.distributed.barrier()
        threading.Thread(target=self._watch, daemon=True, name="rank watch").start()

    def __enter__(self) -> "RankWatch":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        # These the others meet, too, and end by themselves; SystemExit is Megatron's way to end before the target.
        if kind is None or issubclass(kind, (UserError, CheckpointException, SystemExit)):
            self._say(_BYE)
        elif self._peers and issubclass(kind, Exception):
            time.sleep(_VERDICT_SECONDS)
        self._close()

    def _accept(self, listener: socket.socket, count: int, secret: str) -> None:
        deadline = time.monotonic() + _JOIN_SECONDS
        with listener, contextlib.suppress(TimeoutError):
            while len(self._peers) < count:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                peer, _ = listener.accept()
                peer.settimeout(_JOIN_SECONDS)
                given, _, name = _line(peer).partition(" ")
                if given == secret:
                    self._add(peer, name)
                else:
                    peer.close()
        if len(self._peers) < count:
            print(f"note: {count - len(self._peers)} ranks are not watched: they could not connect", file=sys.stderr)

    def _connect(self, port: int, name_of_first: str, introduction: str) -> None:
        with contextlib.suppress(OSError):  # the first rank says that one is missing
            first = socket.create_connection((os.environ["MASTER_ADDR"], port), _JOIN_SECONDS)
            self._add(first, name_of_first)
            self._say(introduction)

    def _add(self, peer: socket.socket, name: str) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
        self._peers[peer] = name

    def _watch(self) -> None:
        """Wait for what the peers say: that they have finished, who was lost, or nothing any more."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ, data=peer)
            while selector.get_map() and not self._is_over:
                for key, _ in selector.select():
                    said = _line(key.data)
                    if said != _BYE and not self._is_over:
                        self._end(said or self._peers[key.data])
                    selector.unregister(key.data)

    def _end(self, lost: str) -> None:
        self._say(lost)
        message = f"megatron-fc: {lost} was lost, so this rank ends too: {self._on_loss(lost)}\n"
        for stream in {sys.stderr, sys.__stderr__}:  # the rank's log and the terminal
            if stream is not None:
                stream.write(message)
                stream.flush()
        for child in multiprocessing.active_children():
            child.kill()
        # The main thread may wait in a collective for ever.
        os._exit(LOST_RANK_EXIT_CODE)

    def _say(self, text: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"{text}\n".encode())

    def _close(self) -> None:
        self._is_over = True
        for peer in self._peers:
            peer.close()


def _line(peer: socket.socket) -> str:
    """The next line, "" where the connection has ended."""
    received = b""
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and (byte := peer.recv(1)):
            received += byte
    return received.decode(errors="replace").strip()
