"""Overlap of collectives with computation, as Megatron's options arrange it.

Data-parallel sums run beside the last micro-batch's backward pass and gathers beside the first one's forward pass
(`overlap_grad_reduce`, `overlap_param_gather`), with FSDP beside those of every micro-batch; the context-parallel ring
beside attention; sends between stages beside computation with virtual stages; tensor-parallel and expert collectives
only with `tp_comm_overlap` and `overlap_moe_expert_parallel_comm`. All else waits, and a second of computation hides a
second of one collective.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from megatron_fc.planning.layout import Layout
from megatron_fc.planning.shape import Training

_PASSES = {"forward": "forward", "recompute": "backward", "backward": "backward", "optimizer": "optimizer"}


class Computed(NamedTuple):
    """Seconds that one pass of a micro-batch computes: in all, and attention alone."""

    total: float
    attention: float


class Network(NamedTuple):
    """Seconds of a step's collectives.

    Attributes:
        waits: those that computation waits for.
        repeated: of them those of every micro-batch, all micro-batches together; the others are once a step.
        hidden: those that run beside computation.
    """

    waits: float
    repeated: float
    hidden: float


def beside_computation(
    times: Mapping[tuple[str, str], float], forward: Computed, backward: Computed, training: Training, layout: Layout
) -> Network:
    """Divide a step's collectives into those that wait and those that do not.

    Args:
        times: seconds by phase and group, of all micro-batches.
        forward, backward: passes of one micro-batch, recompute in the latter.
        training, layout: say what may overlap.
    """
    waiting, hidden = _by_pass_and_kind(times), 0.0
    for one, computed in (("forward", forward), ("backward", backward)):
        free = layout.accumulation_steps * computed.total
        for kind, room in _rooms(one, computed, training, layout).items():
            fits = min(waiting[one, kind], room, free)
            waiting[one, kind] -= fits
            free -= fits
            hidden += fits
    repeated = sum(seconds for (one, kind), seconds in waiting.items() if one != "optimizer" and kind != "dp")
    return Network(sum(waiting.values()), repeated, hidden)


def _alone(training: Training, layout: Layout) -> float:
    """Share of a pass that no other micro-batch's pass runs beside: a pipeline's warm-up, and the very first one."""
    chunks, group = layout.virtual_pipeline, training.group or layout.pipeline
    warm_up = (layout.pipeline - 1) * (1 + (chunks > 1)) + (chunks - 1) * group + 1
    return min(warm_up / (layout.accumulation_steps * chunks), 1.0)


def _by_pass_and_kind(times: Mapping[tuple[str, str], float]) -> defaultdict[tuple[str, str], float]:
    """Groups of data parallelism are of one kind, say dp-cp and expert_dp: they share computation to hide beside."""
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (phase, group), seconds in times.items():
        if group == "pp":  # the stream in forward, its gradient in backward
            sums["forward", group] += seconds / 2
            sums["backward", group] += seconds / 2
        else:
            sums[_PASSES[phase], "dp" if "dp" in group else group] += seconds
    return sums


def _rooms(one: str, computed: Computed, training: Training, layout: Layout) -> dict[str, float]:
    """Seconds of computation that a kind may run beside, those with the least choice first."""
    everything = layout.accumulation_steps * computed.total
    overlaps = training.overlap_param_gather if one == "forward" else training.overlap_grad_reduce
    beside = everything if training.shard_weights or training.shard_gradients else computed.total
    return {
        "cp": layout.accumulation_steps * computed.attention,
        "dp": beside if overlaps else 0.0,
        "tp": everything if training.overlap_tensor else 0.0,
        "ep": everything * (1 - _alone(training, layout)) if training.overlap_experts else 0.0,
        "pp": everything if layout.virtual_pipeline > 1 else 0.0,
    }
