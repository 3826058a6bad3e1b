"""Time of a step's collectives on NVLink and the network, from the bytes that a rank sends."""

from collections import defaultdict
from dataclasses import replace
from functools import cache

from megatron_fc.planning.counts import NetworkCount, NetworkCounts, NetworkKey
from megatron_fc.planning.devices import Device
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.network import network_bytes
from megatron_fc.planning.placement import Placement
from megatron_fc.planning.shape import Shape, Training

_POINT_TO_POINT = ("all_to_all", "send")


def on_domains(layout: Layout, gpu: Device) -> Layout:
    """The same world with NVLink domains for nodes: as many GPUs of a domain as divide the world evenly.

    A domain spans nodes only where the GPU's usual one does; elsewhere it ends with the node.
    """
    node = layout.gpus_per_node
    reach = gpu.nvlink_domain if gpu.nvlink_domain > gpu.gpus_per_node else min(gpu.nvlink_domain, node)
    # A domain is some whole nodes or an even part of one.
    sizes = (size for size in range(1, min(reach, layout.world) + 1) if size % node == 0 or node % size == 0)
    size = max(size for size in sizes if layout.world % size == 0)
    return replace(layout, nodes=layout.world // size, gpus_per_node=size)


def sent(shape: Shape, training: Training, domains: Layout, stage: int) -> NetworkCounts:
    """What one step sends: of the rank of a pipeline stage that ends a domain, whose next ones are on others."""
    per_stage = domains.world // domains.pipeline
    rank = stage * per_stage + min(domains.gpus_per_node, per_stage) - 1
    return network_bytes(shape, domains, training, rank)


def seconds(counts: NetworkCounts, domains: Layout, nvlink: float, network: float) -> dict[tuple[str, str], float]:
    """Time of a step's collectives by phase and group.

    Args:
        counts: what is sent.
        domains: the world, with NVLink domains for nodes.
        nvlink, network: 1e9 bytes per second that a GPU sends inside its domain and to others.
    """
    times: dict[tuple[str, str], float] = defaultdict(float)
    for key, count in counts.items():
        times[key.phase, key.group] += _seconds(key, count, domains, nvlink, network)
    return times


def _seconds(key: NetworkKey, count: NetworkCount, domains: Layout, nvlink: float, network: float) -> float:
    """A ring runs on as many rings as it has ranks in a domain, each over its own adapter; others send beside."""
    if key.collective in _POINT_TO_POINT or key.group == "embedding":
        return max(count.intra_node_bytes / nvlink, count.inter_node_bytes / network) / 1e9
    inside, size = _ranks_in_a_domain(key.group, domains)
    speed = nvlink if inside == size else min(nvlink, inside * network)
    return (count.intra_node_bytes + count.inter_node_bytes) / speed / 1e9


@cache
def _ranks_in_a_domain(group: str, domains: Layout) -> tuple[int, int]:
    """Ranks of a group in the domain of the world's first rank, and in all."""
    rank, size = 0, Placement(domains, 0).size(group)
    for inside in range(1, size):
        rank = Placement(domains, rank).following(group)
        if rank >= domains.gpus_per_node:
            return inside, size
    return size, size
