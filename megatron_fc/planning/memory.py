"""Bytes of a rank: weights, gradients, optimizer, activations; which pipeline stage needs most."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_fc.planning import activations, parameters
from megatron_fc.planning.activations import Kept, Part
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.parameters import Parameters
from megatron_fc.planning.shape import Recompute, Shape, Training
from megatron_fc.planning.stages import Chunk

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Of one rank of a pipeline stage, in bytes.

    Attributes:
        stage: rank in the pipeline.
        weights, gradients, optimizer: as Megatron's DDP and its optimizer hold them.
        activations: kept for backward, of all micro-batches in flight; connection_activations: what is more of them
            than with plain residuals.
        temporary: the largest that lives for a moment: logits, or gradients inside a sub-layer or a connection and what
            is recomputed; and streams that have come from other stages.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    connection_activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def worst_stage(shape: Shape, training: Training, layout: Layout) -> Memory:
    """Of the pipeline stage that needs most."""
    stages = (of_stage(shape, training, layout, stage) for stage in range(layout.pipeline))
    return max(stages, key=lambda memory: memory.total)


def of_stage(shape: Shape, training: Training, layout: Layout, stage: int) -> Memory:
    """Of a rank of one pipeline stage."""
    held = Parameters()
    for chunk in parameters.share_of_stage(shape, layout, stage):
        held += chunk
    shard = _shard(held, layout)
    held_back = _activations(shape, training, layout, stage)
    plain = held_back if shape.connection is None else _activations(*_residual(shape, training), layout, stage)
    return Memory(
        stage=stage,
        weights=weight_bytes(held, training) if not training.shard_weights else weight_bytes(shard, training),
        gradients=gradient_bytes(held, training) if not training.shard_gradients else gradient_bytes(shard, training),
        optimizer=optimizer_bytes(held, training, layout),
        activations=held_back.kept,
        connection_activations=held_back.kept - plain.kept,
        temporary=held_back.temporary + gathered_bytes(shape, training, layout),
    )


def gathered_bytes(shape: Shape, training: Training, layout: Layout) -> float:
    """What FSDP gathers and sums for a moment: of the largest unit, a layer or an end, and of the next one.

    Weights are there in the model's dtype, gradients before their sum.
    """
    units = [parameters.layer(shape, kind.moe) for kind in shape.kinds] + [parameters.embedding(shape)]
    largest = max((unit.on_a_rank(layout) for unit in units), key=lambda unit: unit.total)
    weights = weight_bytes(largest, training) if training.shard_weights else 0.0
    return 2 * (weights + (gradient_bytes(largest, training) if training.shard_gradients else 0.0))


def _shard(held: Parameters, layout: Layout) -> Parameters:
    """One rank's part of parameters that data-parallel ranks divide among them."""
    dense, experts = layout.data * layout.context, layout.expert_data
    return Parameters(held.split // dense, held.whole // dense, held.experts // experts, held.connections // dense)


def weight_bytes(held: Parameters, training: Training) -> float:
    """Connections are fp32 in a model of any dtype."""
    return training.element_bytes * (held.total - held.connections) + _FP32 * held.connections


def gradient_bytes(held: Parameters, training: Training) -> float:
    """DDP's buffer has all of them; those of fp32 parameters are fp32."""
    return training.gradient_bytes * (held.total - held.connections) + _FP32 * held.connections


def optimizer_bytes(held: Parameters, training: Training, layout: Layout) -> float:
    """Moments, and fp32 weights of half-precision ones.

    The distributed optimizer divides them: among data- and context-parallel ranks, experts among expert-data-parallel.
    """
    master = training.master_bytes if training.element_bytes < _FP32 else 0
    dense, experts = 1, 1
    if training.distributed_optimizer:
        dense, experts = layout.data * layout.context, layout.expert_data
    half = (held.split + held.whole) / dense + held.experts / experts
    return (master + training.moment_bytes) * half + training.moment_bytes * held.connections / dense


def checkpoint_bytes(shape: Shape, training: Training) -> tuple[float, float]:
    """Size of a checkpoint: weights alone, and all of it. The optimizer writes its fp32 weights, fp32 ones too."""
    whole = parameters.model(shape)
    weights = weight_bytes(whole, training)
    return weights, weights + (_FP32 + training.moment_bytes) * whole.total


def kept_bytes(kept: tuple[int, int], checkpoint: float) -> str:
    """Return in words what the checkpoints of a whole run need, e.g. ``(4 + 28) x 96.9 GB = 3.1 TB``.

    Args:
        kept: the newest ones, and those that stay for ever.
        checkpoint: bytes of one.
    """
    newest, for_ever = kept
    many = f"({newest:,} + {for_ever:,})" if newest and for_ever else f"{newest + for_ever:,}"
    said = f"{many} x {_decimal(checkpoint)} = {_decimal(checkpoint * sum(kept))}"
    return said if newest or for_ever == 1 else f"{said}, as all stay: keep_last=3 would delete older ones"


def _decimal(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:,.1f} {units[0]}"


def in_flight(training: Training, layout: Layout, stage: int) -> list[int]:
    """Micro-batches whose activations a stage keeps at its peak, by model chunk.

    Megatron's 1F1B: as many forward passes as there are stages behind it, and one; interleaved: twice as many, and a
    group of micro-batches for every chunk but the last (`get_pp_rank_microbatches` and `get_schedule_table` of
    `schedules.py`). Where the experts' communication overlaps, a layer's forward pass runs beside another micro-batch's
    backward pass, which frees as much as the former keeps (`combined_1f1b.py`).
    """
    chunks, micro_batches = layout.virtual_pipeline, layout.accumulation_steps
    behind = layout.pipeline - stage - 1
    if chunks == 1:
        return [min(behind + 1, micro_batches)]
    group = training.group or layout.pipeline
    order = [
        chunk
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for _ in range(first, min(first + group, micro_batches))
    ]
    passes = Counter(order[: 2 * behind + (chunks - 1) * group + 1])
    return [passes[chunk] for chunk in range(chunks)]


class _Held(NamedTuple):
    """Bytes of a micro-batch in one model chunk: kept, the largest temporary."""

    kept: float
    temporary: float


def _residual(shape: Shape, training: Training) -> tuple[Shape, Training]:
    """The same model with plain residuals, which know no recompute of connections."""
    recompute = replace(training.recompute, connections=False, stream_layers=0)
    return replace(shape, connection=None), replace(training, recompute=recompute)


def _activations(shape: Shape, training: Training, layout: Layout, stage: int) -> _Held:
    """Of all micro-batches in flight on a rank of a stage."""
    kept = temporary = 0.0
    for chunk, copies in zip(layout.chunks(stage), in_flight(training, layout, stage), strict=True):
        held = _of_chunk(shape, training, layout, chunk)
        kept += copies * held.kept
        temporary = max(temporary, held.temporary)
    return _Held(kept, temporary + _received(shape, training, layout, stage))


def _of_chunk(shape: Shape, training: Training, layout: Layout, chunk: Chunk) -> _Held:
    recompute, layers = training.recompute, chunk.layers
    tensors = {moe: activations.layer(shape, training, layout, moe) for moe in set(shape.moe_layers)}
    spans = recompute.spans(layers)
    again = {index for span in spans for index in span}
    stream, groups = activations.stream(shape, training, layout), recompute.groups(layers)
    kept = len(groups) * stream
    kept += sum(activations.stream(shape, training, layout, is_embedding=span.start == 0) for span in spans)
    temporary = activations.connection_backward(shape, training, layout)
    for number, index in enumerate(layers):
        of_layer = tensors[shape.moe_layers[index]]
        if index not in again and number >= training.offloaded:
            kept += activations.total(of_layer, recompute.freed)
        in_backward = (_in_backward(of_layer, part, recompute) for part in ("attention", "mlp"))
        # Beside a sub-layer that runs backward waits the gradient of the stream around it.
        temporary = max(temporary, stream * shape.is_wide + max(in_backward))
    temporary += max((sum(activations.total(tensors[shape.moe_layers[i]]) for i in span) for span in spans), default=0)
    # A group's streams come back, with the input of every norm that no kernel applies.
    row = 0.0 if training.fused_connections else activations.stream(shape, training, layout, is_embedding=True)
    temporary += max(((2 * len(group) - 1) * stream + 2 * len(group) * row for group in groups), default=0)
    if chunk.prediction:
        kept += shape.predicted * activations.total(activations.prediction(shape, training, layout), recompute.freed)
    if chunk.embedding:
        kept += activations.total(activations.first(shape, training, layout))
    if chunk.loss:
        kept += activations.total(activations.last(shape, training, layout))
        temporary = max(temporary, activations.logits(shape, training, layout))
    return _Held(kept, temporary)


def _received(shape: Shape, training: Training, layout: Layout, stage: int) -> float:
    """Streams that have come from other stages and are not kept as activations.

    The gradient of a stage's output, while it runs backward; with virtual stages also the next micro-batch's input.
    """
    if layout.pipeline == 1 or (layout.virtual_pipeline == 1 and stage == layout.pipeline - 1):
        return 0.0
    return (1 + (layout.virtual_pipeline > 1)) * activations.stream(shape, training, layout)


def _in_backward(of_layer: list[Kept], part: Part, recompute: Recompute) -> float:
    """Of a sub-layer while it runs backward: its gradients, about as large as what it keeps, and what it recomputed."""
    whole = [tensor for tensor in of_layer if tensor.part == part]
    return 2 * activations.total(whole) - activations.total(whole, recompute.freed)
