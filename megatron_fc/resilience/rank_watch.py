"""A watch over ranks: when one is lost or hangs all end, and say which one it was.

By themselves the survivors of a killed rank wait in a collective: with NCCL for its timeout of ten minutes, with gloo
until a neighbour's connection breaks, which names no rank; under srun nobody else ends them. Here every rank keeps a
connection to the first one. The system closes a dead process's connections at once, so the first rank sees who is
gone and tells the others; if it is the first rank itself, they all see that.

A rank that hangs keeps its connections, and soon nobody makes a step any more. The first rank then asks all of them
where they stand, and tells them what it found; if it is the first rank that gives no sign, each of them ends by itself.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fc.callbacks import Callback, ForwardStep
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.resilience.hang import SILENT, StepClock, describe, place
from megatron_fc.runs.rank_log import is_log_rank

# "Temporary failure" of sysexits.h: a scheduler may start the same again.
LOST_RANK_EXIT_CODE = os.EX_TEMPFAIL
_JOIN_SECONDS = 30.0
# A rank that fails in a collective has mostly lost another one, of which it hears within this time; a rank that can
# answer does so within it.
_VERDICT_SECONDS = 5.0
_LOOK_SECONDS = 1.0
# A file system that is dead may be why all end: notes and advice wait for it this long, the rank itself that long.
_FILES_SECONDS, _EXIT_SECONDS = 10.0, 15.0
# A machine without power closes nothing: probes notice after 15 + 3 * 5 seconds.
_PROBES = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_BYE, _WHERE = "bye", "where?"
_HANG = "no step for"


class RankWatch(Callback):
    """The loss of a rank, or a hang, ends all ranks; errors of this rank's own pass through.

    Args:
        clock: of this rank.
        on_end: told why they end, and whether this rank is the one to note it; returns what to do. It may raise,
            or never return.
    """

    def __init__(self, clock: StepClock, on_end: Callable[[str, bool], str]) -> None:
        self._clock, self._on_end = clock, on_end
        self._name, self._is_first = "", True
        self._peers: dict[socket.socket, str] = {}
        self._is_over = False

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        return self._clock.count(forward_step)

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        self.join()
        return chunks

    def end(self) -> None:
        self._leave()

    def failed(self, error: BaseException) -> BaseException:
        # These the others meet, too, and end by themselves; SystemExit is Megatron's way to end before the target.
        if isinstance(error, (UserError, CheckpointException, SystemExit)):
            self._leave()
        elif self._peers and isinstance(error, Exception):
            time.sleep(_VERDICT_SECONDS)
        self._close()
        return error

    def join(self) -> None:
        """Connect the ranks; all of them call it, once Megatron has joined them."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._name, self._is_first = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})", rank == 0
        if ranks > 1:
            self._meet(rank, ranks)
        threading.Thread(target=self._watch, daemon=True, name="rank watch").start()

    def _meet(self, rank: int, ranks: int) -> None:
        # A checkpoint writer, forked, would keep the connection of a killed rank open.
        os.register_at_fork(after_in_child=self._close)
        listener = socket.create_server(("", 0), backlog=ranks) if rank == 0 else None
        invitation = [(listener.getsockname()[1] if listener else 0, secrets.token_hex(), self._name)]
        torch.distributed.broadcast_object_list(invitation, src=0)
        port, secret, name_of_first = invitation[0]
        if listener:
            self._accept(listener, ranks - 1, secret)
        else:
            self._connect(port, name_of_first, f"{secret} {self._name}")
        torch.distributed.barrier()

    def _leave(self) -> None:
        self._is_over = True  # before anybody answers to it by closing the connection
        self._say(_BYE)
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
        """Listen to the peers, and look whether this rank stands still."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while not self._is_over:
                for key, _ in selector.select(_LOOK_SECONDS):
                    self._hear(key.fileobj, selector)
                if not self._is_over and self._clock.seconds() > self._clock.limit:
                    self._judge(self._clock.seconds())

    def _hear(self, peer: Any, selector: selectors.BaseSelector) -> None:
        """A peer says that it has finished, asks, says why all end, or says nothing any more."""
        said = _line(peer)
        if said == _WHERE:
            self._say(place())
        elif said == _BYE:
            selector.unregister(peer)
            del self._peers[peer]
        elif not self._is_over:
            self._end(said or f"lost {self._peers[peer]}", is_told=bool(said))

    def _judge(self, seconds: float) -> None:
        """Find out who hangs; the others wait for what the first rank finds."""
        what = f"{_HANG} {seconds:.0f} s"
        if not self._is_first:
            if seconds > self._clock.limit + 1.5 * _VERDICT_SECONDS:
                self._end(f"{what}: {', '.join(self._peers.values())} {SILENT}")
            return
        self._say(_WHERE)
        deadline = time.monotonic() + _VERDICT_SECONDS
        places = {self._name: place()}
        for peer, name in self._peers.items():
            peer.settimeout(max(deadline - time.monotonic(), 0.01))
            places[name] = _line(peer) or SILENT
        self._end(f"{what}: {describe(places)}")

    def _end(self, reason: str, is_told: bool = False) -> None:
        last = threading.Timer(_EXIT_SECONDS, os._exit, [LOST_RANK_EXIT_CODE])
        last.daemon = True
        last.start()
        try:
            self._say(reason)
            for child in multiprocessing.active_children():
                child.kill()
            notes = self._is_first or (not is_told and is_log_rank())  # the last one, where the first is gone
            message = f"megatron-fc: {reason}, so this rank ends: {self._advice(reason, notes)}\n"
            for stream in dict.fromkeys((sys.__stderr__, sys.stderr)):  # the terminal, then the rank's log, a file
                if stream is not None:
                    stream.write(message)
                    stream.flush()
            if reason.startswith(_HANG):
                faulthandler.dump_traceback(sys.stderr)
        finally:
            # The main thread may wait in a collective for ever.
            os._exit(LOST_RANK_EXIT_CODE)

    def _advice(self, reason: str, notes: bool) -> str:
        """What to do, which rests on the run's files: they may be damaged, or never answer."""
        advice = [f"its files do not answer within {_FILES_SECONDS:.0f} s, repair that, start the same command again"]

        def ask() -> None:
            try:
                advice.append(self._on_end(reason, notes))
            except Exception as error:
                advice.append(str(error) or repr(error))

        asking = threading.Thread(target=ask, daemon=True, name="last note")
        asking.start()
        asking.join(_FILES_SECONDS)
        return advice[-1]

    def _say(self, text: str) -> None:
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                peer.sendall(f"{text}\n".encode())

    def _close(self) -> None:
        self._is_over = True
        for peer in list(self._peers):
            peer.close()


def _line(peer: socket.socket) -> str:
    """The next line, "" where the connection has ended."""
    received = b""
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and (byte := peer.recv(1)):
            received += byte
    return received.decode(errors="replace").strip()
