"""Rendezvous of a job's ranks: all report to the first one, and hear who is missing.

It is the store of the first rank through which they speak: that knows by name who has not come, while in a collective
every rank knows no more than that it waits.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_fc.errors import NodeError, UserError

# For what the first rank says to arrive: it knows better than those who wait for it, and its end ends the store.
GRACE = timedelta(seconds=10)


class Rendezvous:
    """A context in which ranks speak with each other; what one of its methods raises on the first rank all ranks raise.

    Args:
        rank: of this process.
        ranks: that are to come.
        limit: for all of them to come, and to reach the first one at MASTER_ADDR and MASTER_PORT.

    Raises:
        NodeError: they do not.
    """

    def __init__(self, rank: int, ranks: int, limit: timedelta) -> None:
        self._rank, self._ranks, self._hosts = rank, ranks, [""] * ranks
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._first = f"the first rank at {address}:{port}"
        with self._named("does not reach"):
            self.store = TCPStore(address, port, ranks, rank == 0, limit, wait_for_workers=False)

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        deadline = time.monotonic() + GRACE.total_seconds()
        with suppress(RuntimeError):
            gone = self.store.add("gone", 1)
            while self._rank == 0 and gone < self._ranks and time.monotonic() < deadline:
                time.sleep(0.01)
                gone = self.store.add("gone", 0)

    def join(self, limit: timedelta) -> None:
        """Wait until all ranks are there."""
        self._hosts = self.gather("come", socket.gethostname(), limit)

    def gather(self, what: str, value: Any, limit: timedelta) -> list[Any]:
        """Return the values of all ranks.

        Args:
            what: that they do, a verb and its object.
            value: of this rank.
            limit: for all of them.

        Raises:
            NodeError: names the first rank that has given none, and its node.
        """
        with self._named("does not reach"):
            self.store.set(f"{what} {self._rank}", pickle.dumps(value))  # type: ignore[arg-type]  # bytes, too
        return list(self.from_first(f"all {what}", lambda: self._collect(what, limit), limit))

    def from_first(self, what: str, make: Callable[[], Any], limit: timedelta) -> Any:
        """Return what `make` returns on the first rank, which alone calls it."""
        if self._rank == 0:
            try:
                outcome = make()
            except (UserError, NodeError) as error:
                outcome = error
            self.store.set(what, pickle.dumps(outcome))  # type: ignore[arg-type]
        else:
            with self._named("hears nothing of"):
                self.store.wait([what], limit + GRACE)
                outcome = pickle.loads(self.store.get(what))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _collect(self, what: str, limit: timedelta) -> list[Any]:
        keys = [f"{what} {rank}" for rank in range(self._ranks)]
        with suppress(RuntimeError):
            self.store.wait(keys, limit)
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        if missing:
            raise NodeError(
                f"{self._name(missing[0])} did not {what} within {limit.total_seconds():.0f} s, {len(missing)} of "
                f"{self._ranks} are missing",
                seen_by_all=True,
            )
        return [pickle.loads(self.store.get(key)) for key in keys]

    def _name(self, rank: int) -> str:
        """With its host, where that is known."""
        per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "0") or 0)
        if host := self._hosts[rank]:
            return f"rank {rank} on {host}"
        return f"rank {rank}" + (f", node {rank // per_node} of the list" if per_node else "")

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise NodeError(
                f"rank {self._rank} on {socket.gethostname()} {what} {self._first}, {str(error).splitlines()[0]}: "
                f"check that one, the network between the nodes, and NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
            ) from None
