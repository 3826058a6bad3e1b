"""A run before it is run: parameters, FLOPs, memory, bytes, time, checkpoints."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megatron_fc.planning import flops, memory, parameters, roofline
from megatron_fc.planning.devices import Device
from megatron_fc.planning.flops import Flops
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.memory import Memory
from megatron_fc.planning.parameters import Parameters
from megatron_fc.planning.roofline import Assumptions, StepTime
from megatron_fc.planning.shape import Shape, Training

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """A run on a machine that need not be here.

    Attributes:
        name: of the run, for people.
        shape, training, layout: the model, how it is trained, how it is spread.
        gpu: data sheet of the GPUs.
        network: 1e9 bytes per second that a GPU sends to other NVLink domains.
        assumed: shares of the peaks.
        notes: what could not be checked, in words.
        pipeline_settings: those of the config that suit its own pipeline alone, by Megatron's names.
    """

    name: str
    shape: Shape
    training: Training
    layout: Layout
    gpu: Device
    network: float
    assumed: Assumptions
    notes: tuple[str, ...] = ()
    pipeline_settings: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> Parameters:
        return parameters.model(self.shape)

    @cached_property
    def memory(self) -> Memory:
        """Of a rank of the pipeline stage that needs most."""
        return memory.worst_stage(self.shape, self.training, self.layout)

    @cached_property
    def step(self) -> StepTime:
        return roofline.step_time(self.shape, self.training, self.layout, self.gpu, self.network, self.assumed)

    @property
    def usable_bytes(self) -> float:
        """Of a GPU's memory, without the reserve."""
        return (1 - self.assumed.reserve) * self.gpu.hbm_bytes

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable_bytes

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch * self.shape.sequence

    @property
    def tokens_per_second(self) -> float:
        """Of the whole machine."""
        return self.tokens_per_step / self.step.total

    @property
    def days(self) -> float:
        """To the target of tokens."""
        return self.training.target_tokens / self.tokens_per_second / SECONDS_PER_DAY

    @cached_property
    def forward(self) -> Flops:
        """Of a token."""
        return flops.forward(self.shape)

    @cached_property
    def recomputed(self) -> Flops:
        """Of a token, in backward once more."""
        return flops.recomputed(self.shape, self.training, self.layout)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation that the estimate comes to: without recompute, of the dense bf16 peak."""
        per_second = 3 * self.forward.total * self.tokens_per_second
        return per_second / (self.layout.world * self.gpu.bf16_tflops * 1e12)

    @property
    def checkpoint_bytes(self) -> tuple[float, float]:
        """Weights alone, and all of a checkpoint."""
        return memory.checkpoint_bytes(self.shape, self.training)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        weights, checkpoint = self.checkpoint_bytes
        seconds = asdict(self.step) | {"total": self.step.total}
        moved, sent, staged = (seconds.pop(f"{what}_bytes") for what in ("hbm", "network", "pipeline"))
        return {
            "run": self.name,
            "gpu": asdict(self.gpu),
            "layout": asdict(self.layout) | {"world": self.layout.world, "data": self.layout.data},
            "recompute": str(self.training.recompute),
            "parameters": asdict(self.parameters)
            | {"total": self.parameters.total, "active": parameters.active(self.shape)},
            "flops_per_token": {
                "forward": asdict(self.forward),
                "backward": asdict(flops.backward(self.shape)),
                "recompute": asdict(self.recomputed),
            },
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total, "usable": self.usable_bytes},
            "fits": self.fits,
            "step_seconds": seconds,
            "step_bytes": {"hbm": moved, "network": sent, "pipeline": staged},
            "stream_width": self.shape.stream_width,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "target_tokens": self.training.target_tokens,
            "days": self.days,
            "checkpoint_bytes": {"weights": weights, "total": checkpoint},
            "assumptions": asdict(self.assumed) | {"network_gb_per_second": self.network},
            "notes": list(self.notes),
        }
