"""Time of a step by a roofline: every operation takes as long as its FLOPs or its bytes, whichever takes longer.

What its collectives add to that says `megatron_fc.planning.overlap`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_fc.errors import UserError
from megatron_fc.planning import links, memory, operations, parameters
from megatron_fc.planning.counts import NetworkCounts
from megatron_fc.planning.devices import Device
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.operations import Operation, Pass
from megatron_fc.planning.overlap import Computed, beside_computation
from megatron_fc.planning.parameters import Parameters
from megatron_fc.planning.shape import Shape, Training


@dataclass(frozen=True)
class Assumptions:
    """Shares of data-sheet peaks that are taken to be reached. Assumed; no run has measured them.

    Attributes:
        compute: of the dense peak, by products of matrices.
        memory: of the memory's bandwidth.
        network: of NVLink's and the network's.
        reserve: of the memory, for CUDA, NCCL, workspaces and fragmentation.
    """

    compute: float = 0.6
    memory: float = 0.8
    network: float = 0.7
    reserve: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value <= 1:
                raise UserError(f"{name}={value} must be greater than 0 and at most 1: it is a share")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline stage, by what limits them.

    Attributes:
        compute: operations that take as long as their FLOPs.
        memory: operations that take as long as their bytes.
        network: collectives that wait.
        bubble: of the pipeline, without what waits once a step.
        optimizer: the update.
        hidden_network: collectives that run beside computation; no part of the total.
        hbm_bytes, network_bytes: that a rank moves and sends in a step; pipeline_bytes: of the latter to other stages.
    """

    compute: float
    memory: float
    network: float
    bubble: float
    optimizer: float
    hidden_network: float
    hbm_bytes: float
    network_bytes: float
    pipeline_bytes: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.network + self.bubble + self.optimizer


def step_time(
    shape: Shape, training: Training, layout: Layout, gpu: Device, network: float, assumed: Assumptions
) -> StepTime:
    """Estimate a step, that of the slowest stage.

    Args:
        shape, training, layout: the run.
        gpu: its data sheet.
        network: 1e9 bytes per second that a GPU sends to other NVLink domains.
        assumed: shares of the peaks.
    """
    domains = links.on_domains(layout, gpu)
    rates = _Rates(gpu, training, network, assumed)
    steps = (_of_stage(shape, training, layout, domains, stage, rates) for stage in _distinct_stages(shape, layout))
    return max(steps, key=lambda step: step.total)


def _distinct_stages(shape: Shape, layout: Layout) -> list[int]:
    """One pipeline stage of each kind: those between the first and the last differ in their kinds of layers alone."""
    kinds: dict[tuple[object, ...], int] = {}
    for stage in range(layout.pipeline):
        held = tuple(
            (tuple(shape.kind(index) for index in chunk.layers), chunk.embedding, chunk.prediction, chunk.loss)
            for chunk in layout.chunks(stage)
        )
        kinds.setdefault((held, stage == 0, stage == layout.pipeline - 1), stage)
    return list(kinds.values())


class _Rates:
    """FLOPs and bytes to seconds."""

    def __init__(self, gpu: Device, training: Training, network: float, assumed: Assumptions) -> None:
        self.gpu, self.network = gpu, network
        self.linear = assumed.compute * gpu.tflops(training.products) * 1e12
        self.other = assumed.compute * gpu.tflops("half") * 1e12
        self.memory = assumed.memory * gpu.hbm_gb_per_second * 1e9
        self.share = assumed.network

    def limits(self, one: Pass, is_linear: bool) -> tuple[float, float]:
        """Seconds by what limits them: FLOPs, bytes; one of the two is 0."""
        by_flops, by_bytes = one.flops / (self.linear if is_linear else self.other), one.bytes / self.memory
        return (by_flops, 0.0) if by_flops > by_bytes else (0.0, by_bytes)


class _Sum:
    """Passes of a micro-batch, added up."""

    def __init__(self, rates: _Rates) -> None:
        self._rates = rates
        self.compute = self.memory = self.attention = self.bytes = 0.0

    def add(self, passes: Iterable[tuple[Operation, Pass]]) -> None:
        for operation, one in passes:
            by_flops, by_bytes = self._rates.limits(one, operation.is_linear)
            self.compute += by_flops
            self.memory += by_bytes
            self.bytes += one.bytes
            if operation.name == "attention":
                self.attention += by_flops + by_bytes

    @property
    def seconds(self) -> float:
        return self.compute + self.memory


def _of_stage(
    shape: Shape,
    training: Training,
    layout: Layout,
    domains: Layout,
    stage: int,
    rates: _Rates,
) -> StepTime:
    forward, backward = _Sum(rates), _Sum(rates)

    def run(listed: list[Operation], again: list[Operation]) -> None:
        forward.add((operation, operation.forward) for operation in listed)
        backward.add((operation, operation.backward) for operation in listed)
        backward.add((operation, operation.forward) for operation in again)

    for chunk in layout.chunks(stage):
        recomputed = {index for span in training.recompute.spans(chunk.layers) for index in span}
        in_a_row = len(chunk.layers)
        by_kind = {kind: operations.layer(shape, training, layout, kind, in_a_row) for kind in shape.kinds}
        for index in chunk.layers:
            listed = by_kind[shape.kind(index)]
            run(listed, listed if index in recomputed else operations.again(listed, training))
        for _ in range(shape.predicted * chunk.prediction):
            listed = operations.prediction(shape, training, layout)
            run(listed, operations.again(listed, training))
        if chunk.loss:
            run(operations.head(shape, training, layout), [])

    counts = links.sent(shape, training, domains, stage)
    at_full_speed = links.seconds(counts, domains, rates.gpu, rates.network)
    network = beside_computation(
        {key: seconds / rates.share for key, seconds in at_full_speed.items()},
        Computed(forward.seconds, forward.attention),
        Computed(backward.seconds, backward.attention),
        training,
        layout,
    )
    micro_batches, update = layout.accumulation_steps, _update_bytes(shape, training, layout, stage)
    per_micro_batch = forward.seconds + backward.seconds + network.repeated / micro_batches
    return StepTime(
        compute=micro_batches * (forward.compute + backward.compute),
        memory=micro_batches * (forward.memory + backward.memory),
        network=network.waits,
        bubble=(layout.pipeline - 1) / layout.virtual_pipeline * per_micro_batch,
        optimizer=update / rates.memory,
        hidden_network=network.hidden,
        hbm_bytes=micro_batches * (forward.bytes + backward.bytes) + update,
        network_bytes=_sent(counts),
        pipeline_bytes=_sent({key: count for key, count in counts.items() if key.group == "pp"}),
    )


def _sent(counts: NetworkCounts) -> float:
    return sum(count.intra_node_bytes + count.inter_node_bytes for count in counts.values())


def _update_bytes(shape: Shape, training: Training, layout: Layout, stage: int) -> float:
    held = sum(parameters.share_of_stage(shape, layout, stage), start=Parameters())
    states = memory.optimizer_bytes(held, training, layout)
    per_parameter = training.moment_bytes + (training.master_bytes if training.element_bytes < 4 else 0)
    return operations.optimizer_bytes(held.total, states / per_parameter, states, training)
