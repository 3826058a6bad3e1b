"""Counts the bytes that torch.distributed moves between ranks, by group, phase and collective.

Every collective and every send of torch.distributed is an operator of the dispatcher, whatever the backend, and a
dispatch mode sees it. Autograd hands the mode on to its own threads, so that backward passes are counted too; a Python
thread that a program starts itself is not.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_object, get_process_group_ranks, get_world_size
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fc.errors import UserError
from megatron_fc.planning.counts import NetworkCount, NetworkCounts, NetworkKey
from megatron_fc.planning.ring import ring_all_gather_bytes, ring_all_reduce_bytes, ring_reduce_scatter_bytes
from megatron_fc.profiling.counters.phase import Whereabouts


def gather_hosts(host: str | None = None) -> list[str]:
    """Every rank's host, by rank; a collective call of all ranks.

    Args:
        host: this rank's, its hostname if None.
    """
    hosts: list[str] = [""] * get_world_size()
    all_gather_object(hosts, host or socket.gethostname())
    return hosts


class NetworkCounter(TorchDispatchMode):
    """Counts while it is entered; results stay what they are, since every operator runs as it was called.

    Args:
        where: tells the phase.
        names: what process groups are called. A group without a name is called "world" if it holds all ranks, else
            by its ranks. A send on a group of all ranks goes by the first named group of just its two ranks:
            Megatron sends between two pipeline stages on the default group.
        hosts: each rank's, as `gather_hosts` returns them.

    Attributes:
        counts: what was counted so far. Groups of one rank move nothing and are left out.

    Raises:
        UserError: a functional collective is called while the counter is entered.
    """

    def __init__(self, where: Whereabouts, names: Mapping[ProcessGroup, str], hosts: Sequence[str]) -> None:
        super().__init__()
        self.counts: NetworkCounts = {}
        self._where, self._names, self._hosts = where, names, hosts
        self._pairs: dict[frozenset[int], str] = {}
        for group, name in names.items():
            ranks = get_process_group_ranks(group)
            if len(ranks) == 2:
                self._pairs.setdefault(frozenset(ranks), name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            names = [argument.name for argument in func._schema.arguments]
            if "group_name" in names:
                raise UserError(
                    f"network bytes of the functional collective {func} are not counted: DTensor and Megatron's FSDP "
                    f"use such, count a run without them"
                )
            if "process_group" in names:
                self._count(func._opname, dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: dict[str, Any]) -> None:
        group = ProcessGroup.unbox(args["process_group"])
        if group.size() == 1:
            return
        collective, read = OPERATORS[operator]
        transfer = read(args, group.rank(), group.size())
        ranks = get_process_group_ranks(group)
        count = NetworkCount(calls=1, payload_bytes=transfer.payload_bytes)
        for to, sent_bytes in transfer.sent_bytes.items():
            if self._hosts[ranks[to]] == self._hosts[ranks[group.rank()]]:
                count.intra_node_bytes += sent_bytes
            else:
                count.inter_node_bytes += sent_bytes
        name = self._name(group, ranks)
        peer = args.get("dst", args.get("src"))
        if peer is not None and len(ranks) == len(self._hosts):
            name = self._pairs.get(frozenset((ranks[group.rank()], ranks[peer])), name)
        self.counts.setdefault(NetworkKey(self._where.now().phase, name, collective), NetworkCount()).add(count)

    def _name(self, group: ProcessGroup, ranks: Sequence[int]) -> str:
        if group in self._names:
            return self._names[group]
        return "world" if len(ranks) == len(self._hosts) else "ranks " + ",".join(map(str, ranks))


@dataclass(frozen=True)
class _Transfer:
    """What one call moves: its payload, and what this rank sends, by the receiver's rank in the group."""

    payload_bytes: int
    sent_bytes: Mapping[int, int]


_Read = Callable[[dict[str, Any], int, int], _Transfer]


def _bytes(tensors: Tensor | Sequence[Tensor]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _ring(whole: str, sent_bytes: Callable[[int, int], int]) -> _Read:
    """A collective of equal parts; `whole` is the argument that holds all of them."""

    def read(args: dict[str, Any], rank: int, size: int) -> _Transfer:
        payload = _bytes(args[whole])
        return _Transfer(payload, {(rank + 1) % size: sent_bytes(payload, size)})

    return read


def _all_gather_lists(whole: str) -> _Read:
    """Parts may differ: each rank passes on all of them but the next rank's own."""

    def read(args: dict[str, Any], rank: int, size: int) -> _Transfer:
        following, lists = (rank + 1) % size, args[whole]
        payload = sum(_bytes(parts) for parts in lists)
        return _Transfer(payload, {following: payload - sum(_bytes(parts[following]) for parts in lists)})

    return read


def _reduce_scatter_lists(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    """Parts may differ: each rank sends partial sums of all of them but its own."""
    payload = sum(_bytes(parts) for parts in args["input_tensors"])
    kept = sum(_bytes(parts[rank]) for parts in args["input_tensors"])
    return _Transfer(payload, {(rank + 1) % size: payload - kept})


def _all_to_all_single(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    tensor = args["input"]
    row_bytes = tensor.element_size() * prod(tensor.shape[1:])
    rows = args["input_split_sizes"] or [tensor.shape[0] // size] * size
    return _to_others({to: count * row_bytes for to, count in enumerate(rows)}, rank)


def _all_to_all(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    return _to_others({to: _bytes(part) for to, part in enumerate(args["input_tensors"])}, rank)


def _to_others(parts: dict[int, int], rank: int) -> _Transfer:
    sent = {to: part for to, part in parts.items() if to != rank}
    return _Transfer(sum(sent.values()), sent)


def _broadcast(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    """Along the ring from the root: every rank but the last one passes the whole on."""
    payload, following = _bytes(args["tensors"]), (rank + 1) % size
    return _Transfer(payload, {} if following == args["root_rank"] else {following: payload})


def _reduce(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    """Along the ring to the root: every rank but the root passes a partial sum on."""
    payload = _bytes(args["tensors"])
    return _Transfer(payload, {} if rank == args["root_rank"] else {(rank + 1) % size: payload})


def _gather(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    own, root = _bytes(args["input_tensors"]), args["root_rank"]
    return _Transfer(own * size, {} if rank == root else {root: own})


def _scatter(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    payload = _bytes(args["output_tensors"]) * size
    if rank != args["root_rank"]:
        return _Transfer(payload, {})
    return _Transfer(payload, _to_others(dict(enumerate(map(_bytes, args["input_tensors"][0]))), rank).sent_bytes)


def _send(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    payload = _bytes(args["tensors"])
    return _Transfer(payload, {args["dst"]: payload})


def _nothing(args: dict[str, Any], rank: int, size: int) -> _Transfer:
    return _Transfer(0, {})


# Operators of `torch.ops.c10d`: what they are called in reports, and how their arguments are read.
OPERATORS: dict[str, tuple[str, _Read]] = {
    "allreduce_": ("all_reduce", _ring("tensors", ring_all_reduce_bytes)),
    "allreduce_coalesced_": ("all_reduce", _ring("tensors", ring_all_reduce_bytes)),
    "_allgather_base_": ("all_gather", _ring("output_tensor", ring_all_gather_bytes)),
    "allgather_into_tensor_coalesced_": ("all_gather", _ring("outputs", ring_all_gather_bytes)),
    "allgather_": ("all_gather", _all_gather_lists("output_tensors")),
    "allgather_coalesced_": ("all_gather", _ring("output_lists", ring_all_gather_bytes)),
    "_reduce_scatter_base_": ("reduce_scatter", _ring("input_tensor", ring_reduce_scatter_bytes)),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _ring("inputs", ring_reduce_scatter_bytes)),
    "reduce_scatter_": ("reduce_scatter", _reduce_scatter_lists),
    "alltoall_base_": ("all_to_all", _all_to_all_single),
    "alltoall_": ("all_to_all", _all_to_all),
    "broadcast_": ("broadcast", _broadcast),
    "reduce_": ("reduce", _reduce),
    "gather_": ("gather", _gather),
    "scatter_": ("scatter", _scatter),
    "send": ("send", _send),
    "recv_": ("recv", _nothing),
    "recv_any_source_": ("recv", _nothing),
    "barrier": ("barrier", _nothing),
    "monitored_barrier_": ("barrier", _nothing),
}
