"""Counts of bytes, of device memory and on the network, by where they arise: measured, predicted, reported."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "recompute", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "recompute", "backward", "optimizer")


@dataclass(frozen=True)
class DeviceKey:
    """Where device-memory traffic arises.

    Attributes:
        phase: recompute is a forward pass inside backward; optimizer is all that is neither.
        module: path of the module in the model, "" for what is outside of it.
        op: as torch names it, say `aten.mul`.
    """

    phase: Phase
    module: str
    op: str


@dataclass
class DeviceCount:
    """Traffic of one key.

    Attributes:
        calls: of the operation.
        read_bytes, written_bytes: each tensor of a call once, whatever a cache may save.
        seconds: time of its kernels on the device, None where no profiler has measured it.
    """

    calls: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float | None = None

    def add(self, other: "DeviceCount") -> None:
        self.calls += other.calls
        self.read_bytes += other.read_bytes
        self.written_bytes += other.written_bytes
        if other.seconds is not None:
            self.seconds = (self.seconds or 0.0) + other.seconds


@dataclass(frozen=True)
class NetworkKey:
    """Where network traffic arises.

    Attributes:
        phase: as for device memory.
        group: which parallelism, say `tp` or `dp-cp`.
        collective: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`, `broadcast`, `send`, `recv`, ...
    """

    phase: Phase
    group: str
    collective: str


@dataclass
class NetworkCount:
    """Traffic of one key, of one rank.

    Attributes:
        calls: of the collective.
        payload_bytes: the whole that is gathered or reduced; what is given to others for all-to-all and send.
        intra_node_bytes, inter_node_bytes: sent by this rank to a rank on its own node or on another one.
    """

    calls: int = 0
    payload_bytes: int = 0
    intra_node_bytes: int = 0
    inter_node_bytes: int = 0

    def add(self, other: "NetworkCount") -> None:
        self.calls += other.calls
        self.payload_bytes += other.payload_bytes
        self.intra_node_bytes += other.intra_node_bytes
        self.inter_node_bytes += other.inter_node_bytes


DeviceCounts = dict[DeviceKey, DeviceCount]
NetworkCounts = dict[NetworkKey, NetworkCount]


def total_device(counts: Iterable[DeviceCount]) -> DeviceCount:
    """Sum of counts."""
    total = DeviceCount()
    for count in counts:
        total.add(count)
    return total


def total_network(counts: Iterable[NetworkCount]) -> NetworkCount:
    """Sum of counts."""
    total = NetworkCount()
    for count in counts:
        total.add(count)
    return total
