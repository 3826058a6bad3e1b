"""Time of a step: every operation takes as long as its FLOPs and its bytes, at the shares of peaks that are reached.

Bytes count beside FLOPs, not under them: a product of small sides reaches less of the peak, as its operands travel
longer than they multiply. A pass takes at least as long as the host needs to launch its kernels. What collectives add
says `megatron_fc.planning.overlap`; the shares are those of `megatron_fc.planning.calibration`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fc.planning import links
from megatron_fc.planning.calibration import Assumptions
from megatron_fc.planning.devices import Device
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.overlap import Computed, beside_computation
from megatron_fc.planning.shape import Training
from megatron_fc.planning.work import PassWork, Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline stage, by what they are for.

    Attributes:
        compute, memory: FLOPs and bytes of operations.
        launches: the device waits for the host.
        network: collectives that wait.
        bubble: of the pipeline, without what waits once a step.
        optimizer: the update.
        hidden_network: collectives that run beside computation; no part of the total.
        hbm_bytes, network_bytes: that a rank moves and sends in a step; pipeline_bytes: of the latter to other stages.
    """

    compute: float
    memory: float
    launches: float
    network: float
    bubble: float
    optimizer: float
    hidden_network: float
    hbm_bytes: float
    network_bytes: float
    pipeline_bytes: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.launches + self.network + self.bubble + self.optimizer


def step_time(
    stages: Iterable[Work], training: Training, layout: Layout, gpu: Device, network: float, assumed: Assumptions
) -> StepTime:
    """Estimate a step, that of the slowest stage.

    Args:
        stages: what each of them does.
        training, layout: the run.
        gpu: its data sheet.
        network: 1e9 bytes per second that a GPU sends to other NVLink domains.
        assumed: what is reached of it.
    """
    rates = _Rates(gpu, training, network, assumed)
    return max((_of_stage(work, training, layout, rates) for work in stages), key=lambda step: step.total)


class _Rates:
    """FLOPs, bytes and launches to seconds."""

    def __init__(self, gpu: Device, training: Training, network: float, assumed: Assumptions) -> None:
        self.linear = assumed.compute * gpu.tflops(training.products) * 1e12
        self.other = assumed.compute_half * gpu.tflops("half") * 1e12
        self.exponentials = gpu.exponentials * 1e12
        self.connections = assumed.connections
        self.memory = assumed.memory * gpu.hbm_gb_per_second * 1e9
        self.nvlink = assumed.nvlink * gpu.nvlink_gb_per_second
        self.network = assumed.network * network
        self.launch = assumed.launch * 1e-6

    def compute(self, one: PassWork) -> float:
        return one.linear / self.linear + one.other / self.other + one.exponentials / self.exponentials

    def pass_of(self, one: PassWork) -> tuple[float, float, float]:
        """Seconds of FLOPs, of bytes, and for which the device waits for the host."""
        slower = (1 / self.connections - 1) * one.connection_bytes
        compute, memory = self.compute(one), (one.bytes + slower) / self.memory
        return compute, memory, max(one.kernels * self.launch - compute - memory, 0.0)


def _of_stage(work: Work, training: Training, layout: Layout, rates: _Rates) -> StepTime:
    passes = [rates.pass_of(work.forward), rates.pass_of(work.backward)]
    attention = [sum(rates.pass_of(one)[:2]) for one in (work.attention_forward, work.attention_backward)]
    network = beside_computation(
        links.seconds(work.counts, work.domains, rates.nvlink, rates.network),
        Computed(sum(passes[0]), attention[0]),
        Computed(sum(passes[1]), attention[1]),
        training,
        layout,
    )
    micro_batches = layout.accumulation_steps
    compute, memory, launches = (micro_batches * sum(parts) for parts in zip(*passes, strict=True))
    per_micro_batch = (compute + memory + launches + network.repeated) / micro_batches
    return StepTime(
        compute=compute,
        memory=memory,
        launches=launches,
        network=network.waits,
        bubble=(layout.pipeline - 1) / layout.virtual_pipeline * per_micro_batch,
        optimizer=work.update / rates.memory,
        hidden_network=network.hidden,
        hbm_bytes=micro_batches * (work.forward.bytes + work.backward.bytes) + work.update,
        network_bytes=work.sent(),
        pipeline_bytes=work.sent("pp"),
    )
