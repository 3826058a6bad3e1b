"""The star of a run's ranks: a connection of each to the first one, made before Megatron's own.

Megatron's rendezvous waits ten minutes for a rank that is lost before, never notices that another program listens at
MASTER_PORT, and does not hear signals meanwhile. So the ranks come together here first, and hear who is missing. The
first rank then opens the store through which Megatron joins them, at a port that is free.
"""

import errno
import json
import os
import selectors
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_fc.errors import NodeError

COME_SECONDS = 300.0  # a rank's first start reads Python's packages from a file system that all share
_ANSWER_SECONDS = 10.0
_RETRY_SECONDS = 0.2
# A machine without power closes nothing: probes notice after 15 + 3 * 5 seconds.
_PROBES = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Star:
    """A rank's end of the star.

    Args:
        rank: of this process.
        ranks: that are to come, two or more.
        name: of this rank, for people.
        run: what is the same on all ranks of this run, and on no others.

    Attributes:
        peers: the connections, and the names of those at their other ends: all others on the first rank, that one
            elsewhere.

    Raises:
        NodeError: a rank has not come, or has been lost, or another program listens where the first rank should.
    """

    def __init__(self, rank: int, ranks: int, name: str, run: str) -> None:
        self.peers: dict[socket.socket, str] = {}
        self._rank, self._ranks, self._name, self._run = rank, ranks, name, run
        self._deadline = time.monotonic() + COME_SECONDS
        self._store: TCPStore | None = None
        self._address = os.environ["MASTER_ADDR"]
        # Else the ranks can speak already, and the port of MASTER_PORT is taken.
        self._is_new = not dist.is_initialized() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._port = int(os.environ["MASTER_PORT"]) if self._is_new else 0
        if rank == 0:
            self._accept_all()
        else:
            self._connect()

    def _accept_all(self) -> None:
        missing = set(range(1, self._ranks))
        with self._listen() as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while missing:
                ready = selector.select(max(self._deadline - time.monotonic(), 0.0))
                if not ready and time.monotonic() >= self._deadline:
                    self._end_all(
                        f"rank {min(missing)} did not come within {COME_SECONDS:.0f} s, {len(missing)} of "
                        f"{self._ranks} are missing"
                    )
                for key, _ in ready:
                    if key.fileobj is not listener:  # nobody speaks now
                        self._end_all(f"lost {self.peers[key.fileobj]}")  # type: ignore[index]
                    elif (peer := self._admit(listener, missing)) is not None:
                        selector.register(peer, selectors.EVENT_READ)
        if self._is_new:
            limit = timedelta(seconds=COME_SECONDS)
            # Megatron's process group finds it by its port, as both are multi-tenant.
            self._store = TCPStore("localhost", 0, self._ranks, True, limit, wait_for_workers=False, multi_tenant=True)
            os.environ["MASTER_PORT"] = str(self._store.port)
        for peer in self.peers:
            _send(peer, {"port": os.environ.get("MASTER_PORT")})

    def _listen(self) -> socket.socket:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", self._port), family=family, backlog=self._ranks, dualstack_ipv6=both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise NodeError(
                f"port {self._port} of {socket.gethostname()} is in use by another program: end that, or set another "
                f"MASTER_PORT"
            ) from None
        if not self._is_new:
            self._broadcast(listener.getsockname()[1])
        return listener

    def _admit(self, listener: socket.socket, missing: set[int]) -> socket.socket | None:
        """Let a rank in, and take it from those that are missing; None where it is none of this run's."""
        peer, _ = listener.accept()
        peer.settimeout(_ANSWER_SECONDS)
        said = _receive(peer)
        if said.get("run") == self._run and said.get("rank") in missing:
            missing.remove(said["rank"])
            keep_alive(peer)
            self.peers[peer] = said["name"]
            _send(peer, {"first": self._name})
            return peer
        why = f"{self._run} has this port: set another MASTER_PORT"
        if said.get("run") == self._run:
            why = "that rank has come already: end the other run, or give each process a RANK of its own"
        if said:
            _send(peer, {"refused": why})
        peer.close()
        return None

    def _end_all(self, why: str) -> None:
        for peer in self.peers:
            with suppress(OSError):
                _send(peer, {"refused": why})
            peer.close()
        raise NodeError(why)

    def _connect(self) -> None:
        if not self._is_new:
            self._port = self._broadcast(0)
        first = f"the first rank at {self._address}:{self._port}"
        peer = self._reach(first)
        peer.settimeout(_ANSWER_SECONDS)
        with suppress(OSError):
            _send(peer, {"run": self._run, "rank": self._rank, "name": self._name})
        said = _receive(peer)
        if "first" in said:
            keep_alive(peer)
            self.peers[peer] = said["first"]
            peer.settimeout(max(self._deadline - time.monotonic(), 0.0) + _ANSWER_SECONDS)
            said = _receive(peer) or {"refused": f"lost {said['first']}"}
        if "port" not in said:
            peer.close()
            other = f"what listens at {self._address}:{self._port} is not the first rank"
            raise NodeError(
                f"{self._name}: {said.get('refused') or f'{other}: end that program, or set another MASTER_PORT'}"
            )
        peer.settimeout(None)
        if self._is_new:
            os.environ["MASTER_PORT"] = said["port"]

    def _reach(self, first: str) -> socket.socket:
        while True:
            left = self._deadline - time.monotonic()
            try:
                return socket.create_connection((self._address, self._port), min(max(left, 0.1), _ANSWER_SECONDS))
            except OSError as error:
                if left < 0:
                    raise NodeError(
                        f"{self._name} does not reach {first} within {COME_SECONDS:.0f} s, {error.strerror or error}: "
                        f"check that one, and the network between the nodes"
                    ) from None
                time.sleep(_RETRY_SECONDS)

    def _broadcast(self, port: int) -> int:
        """The first rank's port, through what joins the ranks already: a process group, or else torchrun's store."""
        if dist.is_initialized():
            ports = [port]
            dist.broadcast_object_list(ports, src=0)
            return ports[0]
        limit = timedelta(seconds=COME_SECONDS)
        store = TCPStore(self._address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
        key = f"megatron_fc {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if self._rank == 0:
            store.set(key, str(port))
        return int(store.get(key))


def keep_alive(peer: socket.socket) -> None:
    """Let a connection last, and end where the other machine has."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES:
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def line_of(peer: socket.socket) -> str:
    """The next line, "" where the connection has ended or its time is over."""
    received = b""
    with suppress(OSError):
        while not received.endswith(b"\n") and (byte := peer.recv(1)):
            received += byte
    return received.decode(errors="replace").strip()


def _send(peer: socket.socket, facts: dict[str, Any]) -> None:
    peer.sendall(f"{json.dumps(facts)}\n".encode())


def _receive(peer: socket.socket) -> dict[str, Any]:
    """What the other end says, nothing where that is not what this module says."""
    with suppress(ValueError):
        said = json.loads(line_of(peer))
        if isinstance(said, dict):
            return said
    return {}
