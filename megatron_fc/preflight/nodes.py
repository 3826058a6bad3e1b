"""The check of a job's nodes before it takes them for days, by all its ranks, within a minute.

All ranks meet; rank 0 reads the config; every node shows its devices, its clock and what it sees of the files; the
ranks add their numbers over the networks that the training uses.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fc.errors import NodeError, UserError
from megatron_fc.planning.memory import kept_bytes
from megatron_fc.preflight.rendezvous import Rendezvous
from megatron_fc.runs.writable import failure_to_write

RENDEZVOUS = timedelta(seconds=300)  # a rank's first start reads Python's packages from a file system that all share
CHECK = timedelta(seconds=60)
SKEW_SECONDS = 5.0  # logs of nodes can no longer be compared, and munge refuses far more
_ELEMENTS = 1 << 22  # of the all-reduce: 16 MiB


@dataclass(frozen=True)
class DiskSpace:
    """What a run will write.

    Attributes:
        folder: of its checkpoints; it need not exist yet.
        checkpoint_bytes: size of one, of the last or estimated; None where neither can be.
        checkpoints: how many are written before one is deleted.
        kept: how many the whole run needs room for, the newest ones and older ones that stay for ever.
    """

    folder: Path
    checkpoint_bytes: int | None
    checkpoints: int
    kept: tuple[int, int]

    def check(self) -> str:
        """Return in words what is free, and needed.

        Raises:
            UserError: that is more.
        """
        free = shutil.disk_usage(_existing(self.folder)).free
        if self.checkpoint_bytes is None:
            return f"{_size(free)} free, what a checkpoint needs is not known"
        needed = self.checkpoint_bytes * self.checkpoints
        need = f"{self.checkpoints} more checkpoint{'s need' if self.checkpoints > 1 else ' needs'} {_size(needed)}"
        if free < needed:
            raise UserError(f"{self.folder} has {_size(free)} free, {need}: make room or choose another run_dir")
        return f"{_size(free)} free, {need}"

    def of_the_whole_run(self) -> str | None:
        """Return what all its checkpoints need, in words; None where the size of one is not known."""
        return None if self.checkpoint_bytes is None else kept_bytes(self.kept, self.checkpoint_bytes)


@dataclass(frozen=True)
class Requirements:
    """What a run needs.

    Attributes:
        folders: that it writes, on every node, with the setting that names each.
        files: that it reads, on every node, with the setting that names each.
        indexes: folders where its first rank will write indexes of the data, which all read, with the way out.
        on_devices: it trains on CUDA devices, one per rank.
        disk_space: for checkpoints; None if it saves none.
    """

    folders: dict[Path, str]
    files: dict[Path, str]
    indexes: dict[Path, str]
    on_devices: bool
    disk_space: DiskSpace | None


@dataclass(frozen=True)
class _Seen:
    """What a rank sees of its node."""

    host: str
    devices: int
    clock: float
    problem: str | None


def preflight(read_requirements: Callable[[], Requirements]) -> str:
    """Run all checks; every rank calls it, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

    Args:
        read_requirements: reads and checks the config; called on rank 0 alone.

    Returns:
        What was found, in a sentence.

    Raises:
        UserError: the user must change something, e.g. make room; on all ranks, with the same words.
        NodeError: a node or the network is at fault.
    """
    if "RANK" not in os.environ:
        raise UserError("preflight is for all ranks of a job: start it with srun, mpirun or torchrun, as launch/ does")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with Rendezvous(rank, ranks, RENDEZVOUS) as rendezvous:
        rendezvous.join(RENDEZVOUS)
        needs: Requirements = rendezvous.from_first("requirements", read_requirements, RENDEZVOUS)
        # All hear of the requirements at the same time, and read their clocks.
        seen = rendezvous.gather("look at its files", _look(needs), CHECK)
        for node in seen:
            if node.problem:
                raise UserError(f"{node.host}: {node.problem}")
        space = (
            rendezvous.from_first("disk space", needs.disk_space.check, CHECK)
            if needs.disk_space
            else "no checkpoints are saved"
        )
        found = [_devices(seen, needs), _clocks(seen), space, _add_up(rank, ranks, needs.on_devices, rendezvous.store)]
    hosts = len({s.host for s in seen})
    return f"{ranks} ranks on {hosts} node{'s' * (hosts > 1)}; {'; '.join(found)}"


def _look(needs: Requirements) -> _Seen:
    clock, problem = time.time(), None
    for file, setting in needs.files.items():
        if not file.exists():
            problem = f"{setting}: {file} does not exist there: mount it, or correct the config"
    if os.environ["RANK"] == "0":
        for folder, remedy in needs.indexes.items():
            if why := failure_to_write(_existing(folder), size=0):
                problem = f"indexes of the data cannot be written to {folder}, {why.strerror}: {remedy}"
    for folder, setting in needs.folders.items():
        if why := failure_to_write(folder, size=0):
            problem = f"{setting}={folder} cannot be written, {why.strerror}: mount it, or choose another"
    return _Seen(socket.gethostname(), torch.cuda.device_count(), clock, problem)


def _devices(seen: Sequence[_Seen], needs: Requirements) -> str:
    if not needs.on_devices:
        return "no devices needed"
    for host in dict.fromkeys(s.host for s in seen):
        here = [s for s in seen if s.host == host]
        devices = min(s.devices for s in here)
        if devices < len(here):
            raise NodeError(f"{host} has {devices} CUDA devices for {len(here)} ranks: drain it", True)
        if devices > len(here):
            raise UserError(
                f"{host} has {devices} CUDA devices for {len(here)} ranks, and some would be idle: start one rank for "
                f"each, or hide the others (CUDA_VISIBLE_DEVICES)"
            )
    return f"{min(s.devices for s in seen)} CUDA devices each"


def _clocks(seen: Sequence[_Seen]) -> str:
    first, last = (pick(seen, key=lambda s: s.clock) for pick in (min, max))
    apart = last.clock - first.clock
    if apart > SKEW_SECONDS:
        raise NodeError(f"the clocks of {first.host} and {last.host} are {apart:.1f} s apart: set them by NTP", True)
    return f"clocks within {apart:.2f} s"


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above that exists."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def _size(count: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:,.1f} {units[0]}"


def _add_up(rank: int, ranks: int, on_devices: bool, store: Any) -> str:
    """All-reduce over the training's network, twice: the first one also connects."""
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # else NCCL's watchdog kills the process, where a call could raise
    backend = "cpu:gloo,cuda:nccl" if on_devices else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_devices else torch.device("cpu")
    if on_devices and not torch.cuda.is_available():
        raise UserError("there is no GPU here: set distributed_backend=gloo to check a run on the CPU lane")
    wanted, seconds, is_right = float(sum(range(1, ranks + 1))), 0.0, True
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=CHECK)
        dist.all_reduce(torch.ones(1))  # Megatron speaks over gloo as well
        for _ in range(2):
            numbers = torch.full((_ELEMENTS,), float(rank + 1), device=device)
            start = time.perf_counter()
            dist.all_reduce(numbers)
            is_right &= bool((numbers == wanted).all())  # waits for the device
            seconds = time.perf_counter() - start
    except RuntimeError as error:
        raise NodeError(f"all-reduce failed on {socket.gethostname()}: {str(error).splitlines()[0]}") from None
    if not is_right:
        raise NodeError(f"all-reduce gave a wrong sum on {socket.gethostname()}: drain the node")
    dist.destroy_process_group()
    return f"all-reduce of 16 MiB over {'NCCL' if on_devices else 'gloo'} right, {seconds * 1e3:.1f} ms"
