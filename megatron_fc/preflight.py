"""What must hold before nodes are taken for days, checked by all ranks in a minute.

All ranks meet; rank 0 reads the config; every node shows its devices, its clock and what it sees of the files; the
ranks add their numbers over the networks that the training uses.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_fc.errors import UserError

MEETING = timedelta(seconds=60)
SKEW_SECONDS = 5.0  # logs of nodes can no longer be compared, and munge refuses far more
_ELEMENTS = 1 << 22  # of the all-reduce: 16 MiB


class NodeError(Exception):
    """A node or the network is at fault: the same may work elsewhere or later.

    Attributes:
        seen_by_all: all ranks raise it, with the same words.
    """

    def __init__(self, text: str, seen_by_all: bool = False) -> None:
        super().__init__(text)
        self.seen_by_all = seen_by_all


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        run_dir: where it writes.
        files: that it reads, on every node, with the setting that names each.
        on_devices: it trains on CUDA devices, one per rank.
        checkpoint_bytes: size of a checkpoint, of the last one or estimated; None where neither can be.
        checkpoints: how many lie there at once.
    """

    run_dir: Path
    files: dict[Path, str]
    on_devices: bool
    checkpoint_bytes: int | None
    checkpoints: int


@dataclass(frozen=True)
class _Seen:
    """What a rank sees of its node."""

    host: str
    devices: int
    clock: float
    problem: str | None


def preflight(make_plan: Callable[[], Plan]) -> str:
    """Run all checks; every rank calls it, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

    Args:
        make_plan: reads and checks the config; called on rank 0 alone.

    Returns:
        What was found, in a sentence.

    Raises:
        UserError: the user must change something, e.g. make room; on all ranks, with the same words.
        NodeError: a node or the network is at fault.
    """
    if "RANK" not in os.environ:
        raise UserError("preflight is for all ranks of a job: start it with srun, mpirun or torchrun, as launch/ does")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _meet(rank, ranks)
    plan = _plan_of_all(make_plan, rank)
    seen: list[Any] = [None] * ranks
    dist.barrier()  # clocks are read at the same time
    dist.all_gather_object(seen, _look(plan))
    for node in seen:
        if node.problem:
            raise UserError(f"{node.host}: {node.problem}")
    found = [_devices(seen, plan), _clocks(seen), _room(plan), _add_up(rank, ranks, plan.on_devices)]
    dist.destroy_process_group()
    hosts = len({s.host for s in seen})
    return f"{ranks} ranks on {hosts} node{'s' * (hosts > 1)}; {'; '.join(found)}"


def _meet(rank: int, ranks: int) -> None:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, ranks, rank == 0, MEETING, wait_for_workers=False)
        store.set(f"host{rank}", socket.gethostname())
        if rank == 0:
            _await_all(store, ranks)
            store.set("all are there", "")
        store.wait(["all are there"], MEETING + timedelta(seconds=10))  # rank 0 knows better who is missing
    except NodeError:
        raise
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise NodeError(
            f"rank {rank} on {socket.gethostname()} does not reach the first rank at {address}:{port}, {said}: check "
            f"the network between the nodes and NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
        ) from None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=MEETING)


def _await_all(store: TCPStore, ranks: int) -> None:
    with suppress(RuntimeError):
        store.wait([f"host{rank}" for rank in range(ranks)], MEETING)
        return
    missing = [rank for rank in range(ranks) if not store.check([f"host{rank}"])]
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "0") or 0)
    where = f", node {missing[0] // per_node} of the list" if per_node else ""
    raise NodeError(
        f"rank {missing[0]}{where} did not come within {MEETING.seconds} s, {len(missing)} of {ranks} are missing"
    )


def _plan_of_all(make_plan: Callable[[], Plan], rank: int) -> Plan:
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome = [make_plan()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    plan: Plan = outcome[0]
    return plan


def _look(plan: Plan) -> _Seen:
    clock, problem = time.time(), None
    for file, setting in plan.files.items():
        if not file.exists():
            problem = f"{setting}: {file} does not exist there: mount it, or correct the config"
    probe = plan.run_dir / f".preflight-{os.environ['RANK']}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        problem = f"run_dir={plan.run_dir} cannot be written, {error.strerror}: mount it, or choose another"
    return _Seen(socket.gethostname(), torch.cuda.device_count(), clock, problem)


def _devices(seen: Sequence[_Seen], plan: Plan) -> str:
    if not plan.on_devices:
        return "no devices needed"
    for host in dict.fromkeys(s.host for s in seen):
        here = [s for s in seen if s.host == host]
        if min(s.devices for s in here) < len(here):
            raise NodeError(
                f"{host} has {min(s.devices for s in here)} CUDA devices for {len(here)} ranks: drain it", True
            )
    return f"{min(s.devices for s in seen)} CUDA devices each"


def _clocks(seen: Sequence[_Seen]) -> str:
    first, last = (pick(seen, key=lambda s: s.clock) for pick in (min, max))
    apart = last.clock - first.clock
    if apart > SKEW_SECONDS:
        raise NodeError(f"the clocks of {first.host} and {last.host} are {apart:.1f} s apart: set them by NTP", True)
    return f"clocks within {apart:.2f} s"


def _room(plan: Plan) -> str:
    free = shutil.disk_usage(plan.run_dir).free
    if plan.checkpoint_bytes is None:
        return f"{_size(free)} free"
    needed = plan.checkpoint_bytes * plan.checkpoints
    need = f"{plan.checkpoints} checkpoints need {_size(needed)}"
    if free < needed:
        raise UserError(f"{plan.run_dir} has {_size(free)} free, {need}: make room or choose another run_dir")
    return f"{_size(free)} free, {need}"


def _size(count: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:,.1f} {units[0]}"


def _add_up(rank: int, ranks: int, on_devices: bool) -> str:
    """All-reduce over the training's network, twice: the first one also connects."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_devices else torch.device("cpu")
    wanted, seconds = float(sum(range(1, ranks + 1))), 0.0
    for _ in range(2):
        numbers = torch.full((_ELEMENTS,), float(rank + 1), device=device)
        start = time.perf_counter()
        try:
            dist.all_reduce(numbers)
        except RuntimeError as error:
            raise NodeError(f"all-reduce failed on {socket.gethostname()}: {str(error).splitlines()[0]}") from None
        is_right = bool((numbers == wanted).all())  # waits for the device
        seconds = time.perf_counter() - start
        if not is_right:
            raise NodeError(f"all-reduce gave a wrong sum on {socket.gethostname()}: drain the node")
    return f"all-reduce of 16 MiB over {'NCCL' if on_devices else 'gloo'} right, {seconds * 1e3:.1f} ms"
