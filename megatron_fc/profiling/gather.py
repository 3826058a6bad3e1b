"""Brings the parts of all ranks to the first one, over MPI or torch.distributed, and waits for no rank for ever."""

import sys
import time
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

_TAG = 0x7F1C


class Gatherer(Protocol):
    """Brings texts to rank 0."""

    def gather(self, text: str) -> list[str]:
        """Every rank gives a text; rank 0 gets those of all ranks that gave one in time, the others get none."""


def make_gatherer(timeout: timedelta) -> Gatherer:
    """Return a gatherer over MPI where MPI has started this process, else over torch.distributed.

    All ranks call it while all are there: it makes a process group.
    """
    module: Any = sys.modules.get("mpi4py.MPI")
    if module is not None and not module.Is_finalized():
        return OverMpi(module, timeout)
    return OverTorch(timeout)


class OverTorch:
    """Over a gloo group of all ranks."""

    def __init__(self, timeout: timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, text: str) -> list[str]:
        """See `Gatherer`; where a rank is missing, rank 0 gets no text at all."""
        first = dist.get_rank() == 0
        texts: list[Any] = [None] * dist.get_world_size()
        try:
            dist.gather_object(text, texts if first else None, group=self._group)
        except RuntimeError:  # of gloo, when a rank is gone or late
            return []
        return texts if first else []


class OverMpi:
    """Over MPI's world, rank by rank: those that are there are heard even where one is missing.

    Args:
        mpi: the module `mpi4py.MPI`, initialised.
        timeout: for all of them together.
    """

    def __init__(self, mpi: Any, timeout: timedelta) -> None:
        self._world, self._seconds = mpi.COMM_WORLD, timeout.total_seconds()

    def gather(self, text: str) -> list[str]:
        """See `Gatherer`."""
        deadline = time.monotonic() + self._seconds
        if self._world.Get_rank() != 0:
            request = self._world.isend(text, dest=0, tag=_TAG)
            while not request.test()[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            return []
        texts = [text]
        while len(texts) < self._world.Get_size() and time.monotonic() < deadline:
            if self._world.iprobe(tag=_TAG):
                texts.append(self._world.recv(tag=_TAG))
            else:
                time.sleep(0.01)
        return texts
