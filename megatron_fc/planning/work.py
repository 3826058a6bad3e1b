"""The work of one pipeline stage in a step, counted: what takes time, before anything says how fast.

FLOPs, bytes and kernel launches of one micro-batch's forward and backward pass, bytes of collectives and of the
optimizer's update.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fc.planning import links, memory, operations, parameters
from megatron_fc.planning.counts import NetworkCounts
from megatron_fc.planning.devices import Device
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.parameters import Parameters
from megatron_fc.planning.products import Operation
from megatron_fc.planning.shape import Shape, Training


@dataclass
class PassWork:
    """Of one pass of a micro-batch, all added up.

    Attributes:
        linear: FLOPs, wasted ones included, of products in the precision of the run's linear layers.
        other: those in the model's dtype.
        exponentials: of softmaxes.
        bytes: of device memory.
        kernels: that the host launches one by one.
        connection_bytes: of `bytes`, those between sub-layers: residuals or connections, and norms.
    """

    linear: float = 0.0
    other: float = 0.0
    exponentials: float = 0.0
    bytes: float = 0.0
    kernels: int = 0
    connection_bytes: float = 0.0

    def add(self, listed: Iterable[Operation], captured: frozenset[str], *, backward: bool = False) -> None:
        """Add a pass of operations; the host launches twice as many kernels in backward."""
        for operation in listed:
            one = operation.backward if backward else operation.forward
            if operation.is_linear:
                self.linear += one.flops + one.wasted
            else:
                self.other += one.flops + one.wasted
            self.exponentials += operation.exponentials
            self.bytes += one.bytes
            if operation.module not in captured and "all" not in captured:
                self.kernels += (1 + backward) * operation.kernels
            if operation.name == operations.CONNECTIONS:
                self.connection_bytes += one.bytes


@dataclass(frozen=True)
class Work:
    """Of one pipeline stage.

    Attributes:
        forward, backward: of one micro-batch; recompute is in the latter.
        attention_forward, attention_backward: attention alone, of them.
        domains, counts: NVLink domains of the world, and what a rank that ends one sends in a step.
        update: bytes that the optimizer moves.
    """

    forward: PassWork
    backward: PassWork
    attention_forward: PassWork
    attention_backward: PassWork
    domains: Layout
    counts: NetworkCounts
    update: float

    def sent(self, group: str | None = None) -> float:
        """Bytes that a rank sends in a step: in one kind of parallelism, or in all."""
        chosen = [count for key, count in self.counts.items() if group in (None, key.group)]
        return sum(count.intra_node_bytes + count.inter_node_bytes for count in chosen)


def of_stages(shape: Shape, training: Training, layout: Layout, gpu: Device) -> list[Work]:
    """Of one pipeline stage of each kind: those between the first and the last differ in their layers alone."""
    domains = links.on_domains(layout, gpu)
    stages: dict[object, int] = {}
    for stage in range(layout.pipeline):
        held = tuple((tuple(shape.kind(index) for index in chunk.layers), *chunk[1:]) for chunk in layout.chunks(stage))
        stages.setdefault((held, stage == 0, stage == layout.pipeline - 1), stage)
    return [_of_stage(shape, training, layout, domains, stage) for stage in stages.values()]


def _of_stage(shape: Shape, training: Training, layout: Layout, domains: Layout, stage: int) -> Work:
    forward, backward, attention = PassWork(), PassWork(), (PassWork(), PassWork())
    captured = frozenset(training.captured)

    def run(listed: list[Operation], again: list[Operation]) -> None:
        forward.add(listed, captured)
        backward.add(listed, captured, backward=True)
        backward.add(again, captured)
        own = [operation for operation in listed if operation.name == operations.ATTENTION]
        attention[0].add(own, captured)
        attention[1].add(own, captured, backward=True)
        attention[1].add([operation for operation in again if operation.name == operations.ATTENTION], captured)

    for chunk in layout.chunks(stage):
        recomputed = {index for span in training.recompute.spans(chunk.layers) for index in span}
        kinds = {shape.kind(index) for index in chunk.layers}
        by_kind = {kind: operations.layer(shape, training, layout, kind, len(chunk.layers)) for kind in kinds}
        for index in chunk.layers:
            listed = by_kind[shape.kind(index)]
            run(listed, listed if index in recomputed else operations.again(listed, training))
        for _ in range(shape.predicted * chunk.prediction):
            listed = operations.prediction(shape, training, layout)
            run(listed, operations.again(listed, training))
        if chunk.loss:
            run(operations.head(shape, training, layout), [])
    return Work(
        forward,
        backward,
        *attention,
        domains=domains,
        counts=links.sent(shape, training, domains, stage),
        update=_update_bytes(shape, training, layout, stage),
    )


def _update_bytes(shape: Shape, training: Training, layout: Layout, stage: int) -> float:
    held = sum(parameters.share_of_stage(shape, layout, stage), start=Parameters())
    states = memory.optimizer_bytes(held, training, layout)
    per_parameter = training.moment_bytes + (training.master_bytes if training.element_bytes < 4 else 0)
    return operations.optimizer_bytes(held.total, states / per_parameter, states, training)
