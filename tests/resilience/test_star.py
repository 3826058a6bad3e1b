"""How ranks come together, and what keeps them apart."""

import http.server
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from megatron_fc.errors import NodeError
from megatron_fc.mpi import free_port
from megatron_fc.resilience import star
from megatron_fc.resilience.star import Star
from support.patience import PATIENCE

HOST = socket.gethostname()
FORK = multiprocessing.get_context("fork")


def come(rank: int, ranks: int, port: int, run: str = "a", then: Callable[[], Any] = lambda: "came") -> Any:
    """What becomes of this rank: `then`, or what it says."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    try:
        kept = Star(rank, ranks, f"rank {rank}", f"run_dir={run}")
    except NodeError as error:
        return str(error)
    return then() if kept else None


class Rank:
    """A process that comes as a rank.

    Args:
        arguments: of `come`.
        seconds: in place of those that the star gives a rank to come.
        tells: it says "let in" when the first rank has let it in.
        options: of `come`, too.
    """

    def __init__(self, *arguments: Any, seconds: float = 300.0, tells: bool = False, **options: Any) -> None:
        def run() -> None:
            star.COME_SECONDS, star._ANSWER_SECONDS = seconds, min(seconds, 10.0)
            if tells:
                star.keep_alive = lambda _: says.send("let in")  # which comes right after
            says.send(come(*arguments, **options))
            signal.pause()  # it is there until it is killed

        self._hears, says = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=run)
        self.process.start()
        says.close()

    def said(self) -> Any:
        assert self._hears.poll(PATIENCE)
        return self._hears.recv()


@pytest.fixture
def ranks() -> Iterator[Callable[..., Rank]]:
    started: list[Rank] = []

    def start(*arguments: Any, **options: Any) -> Rank:
        started.append(Rank(*arguments, **options))
        return started[-1]

    yield start
    for rank in started:
        rank.process.kill()
        rank.process.join()


def add_up(rank: int) -> float:
    """By the process group that Megatron would make."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=3)
    number = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(number)
    return number.item()


def test_those_that_have_come_are_joined_at_a_port_that_is_free(ranks: Callable[..., Rank]) -> None:
    """In whichever order they come, also where a rank waits for the first one."""
    port = free_port()
    started = [ranks(rank, 3, port, then=lambda rank=rank: add_up(rank)) for rank in (2, 0, 1)]
    assert [rank.said() for rank in started] == [6.0, 6.0, 6.0]


def test_a_rank_that_does_not_come_is_named_by_all(ranks: Callable[..., Rank]) -> None:
    port = free_port()
    started = [ranks(rank, 4, port, seconds=2.0) for rank in (0, 1, 3)]
    sentence = "rank 2 did not come within 2 s, 1 of 4 are missing"
    assert [rank.said() for rank in started] == [sentence, f"rank 1: {sentence}", f"rank 3: {sentence}"]


def test_a_rank_that_is_lost_while_others_come_is_named_by_all(ranks: Callable[..., Rank]) -> None:
    """At once: in five minutes the last one might come."""
    port = free_port()
    first, second, third = (ranks(rank, 4, port, tells=rank > 0) for rank in range(3))
    assert [second.said(), third.said()] == ["let in", "let in"]
    assert ranks(2, 4, port).said() == (
        "rank 2: that rank has come already: end the other run, or give each process a RANK of its own"
    )
    second.process.kill()
    assert first.said() == "lost rank 1"
    assert third.said() == "rank 2: lost rank 1"


def test_without_a_first_rank_it_is_named(ranks: Callable[..., Rank]) -> None:
    port = free_port()
    sentence = f"rank 1 does not reach the first rank at 127.0.0.1:{port} within 1 s, Connection refused: check that"
    assert ranks(1, 2, port, seconds=1.0).said().startswith(sentence)


@contextmanager
def busy(program: str) -> Iterator[int]:
    """A port that another program has; it says nothing, hangs up, speaks HTTP, or is the store of another run."""
    if program == "store":
        store = torch.distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
        yield store.port
        return
    if program == "http":
        with http.server.HTTPServer(("", 0), http.server.SimpleHTTPRequestHandler) as server:
            server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.server_port
            server.shutdown()
        return
    with socket.create_server(("", 0)) as listener:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()

        if program == "hangs up":
            threading.Thread(target=hang_up, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("program", ["says nothing", "hangs up", "http", "store"])
def test_a_busy_port_ends_all(program: str, ranks: Callable[..., Rank]) -> None:
    with busy(program) as port:
        first, second = ranks(0, 2, port, seconds=1.0), ranks(1, 2, port, seconds=1.0)
        assert first.said() == (
            f"port {port} of {HOST} is in use by another program: end that, or set another MASTER_PORT"
        )
        assert second.said() == (
            f"rank 1: what listens at 127.0.0.1:{port} is not the first rank: end that program, or set another "
            f"MASTER_PORT"
        )


def test_ranks_of_two_runs_are_told_apart(ranks: Callable[..., Rank]) -> None:
    port = free_port()
    first = ranks(0, 2, port, run="a")
    assert ranks(1, 2, port, run="b").said() == "rank 1: run_dir=a has this port: set another MASTER_PORT"
    assert ranks(1, 2, port, run="a").said() == first.said() == "came"
