"""A watch over ranks: when one is lost or hangs all end, and say which one it was.

By themselves the survivors of a killed rank wait in a collective: with NCCL for its timeout of ten minutes, with gloo
until a neighbour's connection breaks, which names no rank; under srun nobody else ends them. Here every rank keeps a
connection to the first one (`megatron_fc.resilience.star`), from before Megatron joins them. The system closes a dead
process's connections at once, so the first rank sees who is gone and tells the others; if it is the first rank itself,
they all see that. A rank that fails says with which error, so that all end with its exit code, and its error is noted.

A rank that hangs keeps its connections, and soon nobody makes a step any more. The first rank then asks all of them
where they stand, and tells them what it found; if it is the first rank that gives no sign, each of them ends by itself.
"""

import contextlib
import faulthandler
import os
import selectors
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from textwrap import shorten
from typing import Any, NoReturn

from torch.distributed.checkpoint.api import CheckpointException

from megatron_fc.callbacks import Callback, ForwardStep
from megatron_fc.errors import UserError
from megatron_fc.resilience.hang import SILENT, StepClock, describe, place
from megatron_fc.resilience.star import Star, line_of
from megatron_fc.runs.rank_log import is_log_rank

# "Temporary failure" of sysexits.h: a scheduler may start the same again. After the other one that would be in vain.
LOST_RANK_EXIT_CODE, WRONG_INPUT_EXIT_CODE = os.EX_TEMPFAIL, 2
# A rank that fails in a collective has mostly lost another one, of which it hears within this time; a rank that can
# answer does so within it.
_VERDICT_SECONDS = 5.0
_LOOK_SECONDS = 1.0
# A file system that is dead may be why all end: notes and advice wait for it this long, the rank itself that long.
_FILES_SECONDS, _EXIT_SECONDS = 10.0, 15.0
# What ranks say: I go; where do you stand; end with this code, for this reason; I fail with this code, for this reason.
_BYE, _WHERE, _END, _FAILED = "bye", "where?", "end", "failed"
_HANG = "no step for"


class RankWatch(Callback):
    """The loss or failure of a rank, or a hang, ends all ranks; errors of this rank's own pass through.

    Args:
        clock: of this rank.
        run: what is the same on all ranks of this run, and on no others.
        on_end: told why they end, and whether this rank is the one to note it; returns what to do. It may raise,
            or never return.
        lost: asked once a second, says what this rank cannot go on without.
    """

    def __init__(
        self,
        clock: StepClock,
        run: str,
        on_end: Callable[[str, bool], str],
        lost: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._clock, self._run, self._on_end, self._lost = clock, run, on_end, lost
        self._name, self._is_first = "", True
        self._star: Star | None = None
        self._peers: dict[socket.socket, str] = {}
        self._failure: tuple[float, int, str] | None = None  # of another rank: when all end, with which code, and why
        self._is_over = False

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        return self._clock.count(forward_step)

    def arguments_valid(self, args: Namespace) -> None:
        self.join()

    def end(self) -> None:
        self._leave(_BYE)

    def failed(self, error: BaseException) -> BaseException:
        if isinstance(error, SystemExit):  # Megatron's way to end before the target, on all ranks
            self._leave(_BYE)
        elif isinstance(error, UserError):
            self._leave(f"{_FAILED} {WRONG_INPUT_EXIT_CODE} {self._name} failed: {' '.join(str(error).split())}")
        elif isinstance(error, (Exception, CheckpointException)):
            if self._peers and isinstance(error, Exception):  # checkpoint errors tell of no lost rank
                time.sleep(_VERDICT_SECONDS)
            what = f"{type(error).__name__}: {error}"
            self._leave(f"{_FAILED} {LOST_RANK_EXIT_CODE} {self._name} failed: {shorten(' '.join(what.split()), 300)}")
        self._close()
        return error

    def join(self) -> None:
        """Connect the ranks; all of them call it.

        Raises:
            NodeError: one has not come.
        """
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._name, self._is_first = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})", rank == 0
        if ranks > 1:
            self._star = Star(rank, ranks, self._name, f"{self._run} of {ranks} ranks")
            self._peers = self._star.peers
            # A helper, forked, would keep the connection of a killed rank open.
            os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._watch, daemon=True, name="rank watch").start()

    def _leave(self, last_word: str) -> None:
        self._is_over = True  # before anybody answers to it by closing the connection
        self._say(last_word)
        self._close()

    def _watch(self) -> None:
        """Listen to the peers, and look whether this rank stands still."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while not self._is_over:
                for key, _ in selector.select(_LOOK_SECONDS):
                    self._hear(key.fileobj, selector)
                if not self._is_over and self._failure and time.monotonic() > self._failure[0]:
                    self._end(self._failure[2], self._failure[1])
                if not self._is_over and (lost := self._lost()):
                    self._end(lost)
                if not self._is_over and self._clock.seconds() > self._clock.limit:
                    self._judge(self._clock.seconds())

    def _hear(self, peer: Any, selector: selectors.BaseSelector) -> None:
        """A peer asks, goes, fails, says why all end, or says nothing any more."""
        said = line_of(peer)
        kind, _, rest = said.partition(" ")
        code, _, reason = rest.partition(" ")
        if said == _WHERE:
            self._say(place())
        elif kind in (_BYE, _FAILED):
            selector.unregister(peer)
            del self._peers[peer]
            if kind == _FAILED and self._failure is None:
                # This rank may be about to meet the same error, and end by itself.
                self._failure = time.monotonic() + _VERDICT_SECONDS, int(code), reason
                self._say(said)
        elif not self._is_over:
            if kind == _END:
                self._end(reason, int(code), is_told=True)
            self._end(f"lost {self._peers[peer]}")

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
            places[name] = line_of(peer) or SILENT
        self._end(f"{what}: {describe(places)}")

    def _end(self, reason: str, code: int = LOST_RANK_EXIT_CODE, is_told: bool = False) -> NoReturn:
        last = threading.Timer(_EXIT_SECONDS, os._exit, [code])
        last.daemon = True
        last.start()
        try:
            self._say(f"{_END} {code} {reason}")
            notes = self._is_first or (not is_told and is_log_rank())  # the last one, where the first is gone
            advice = self._advice(reason, notes)
            # A wrong input says itself what to do.
            rest = "" if code == WRONG_INPUT_EXIT_CODE else f", so this rank ends: {advice}"
            for stream in dict.fromkeys((sys.__stderr__, sys.stderr)):  # the terminal, then the rank's log, a file
                if stream is not None:
                    stream.write(f"megatron-fc: {reason}{rest}\n")
                    stream.flush()
            if reason.startswith(_HANG):
                faulthandler.dump_traceback(sys.stderr)
        finally:
            # The main thread may wait in a collective for ever.
            os._exit(code)

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
