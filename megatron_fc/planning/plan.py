"""A run before it is run: parameters, FLOPs, memory, bytes, time, checkpoints."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from megatron_fc.planning import calibration, flops, memory, parameters, work
from megatron_fc.planning.calibration import Assumptions, Nearest
from megatron_fc.planning.devices import Device
from megatron_fc.planning.flops import Flops
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.memory import Memory
from megatron_fc.planning.parameters import Parameters
from megatron_fc.planning.roofline import StepTime, step_time
from megatron_fc.planning.shape import Shape, Training
from megatron_fc.planning.work import Work

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
        kept_checkpoints: for which the whole run needs room, the newest ones and older ones that stay for ever.
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
    kept_checkpoints: tuple[int, int] = (0, 0)

    @cached_property
    def parameters(self) -> Parameters:
        return parameters.model(self.shape)

    @cached_property
    def memory(self) -> Memory:
        """Of a rank of the pipeline stage that needs most."""
        return memory.worst_stage(self.shape, self.training, self.layout)

    @cached_property
    def step(self) -> StepTime:
        return step_time(self.work, self.training, self.layout, self.gpu, self.network, self.assumed)

    @cached_property
    def work(self) -> list[Work]:
        """Of the pipeline stages, one of each kind."""
        return work.of_stages(self.shape, self.training, self.layout, self.gpu)

    @property
    def sizes(self) -> dict[str, float]:
        """By which a run is like another one, on the same GPU."""
        layout, shape = self.layout, self.shape
        return {
            "GPUs": layout.world,
            "hidden_size": shape.width,
            "active parameters": parameters.active(shape),
            "tokens per micro-batch": layout.micro_batch * shape.sequence / layout.context,
            "experts": max(shape.experts, 1),
        }

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
    def is_calibrated(self) -> bool:
        """Whether published runs on this GPU have fitted the constants, and these are in use."""
        return calibration.runs_of(self.gpu) > 0 and self.assumed == calibration.assumptions(
            self.gpu, self.training.products, reserve=self.assumed.reserve
        )

    @property
    def speed_range(self) -> tuple[float, float] | None:
        """Tokens per second between which four of five runs were, by published ones; None where nothing says so."""
        if not self.is_calibrated:
            return None
        low, high = calibration.error_range(any(self.shape.moe_layers))
        return low * self.tokens_per_second, high * self.tokens_per_second

    @property
    def nearest(self) -> Nearest:
        """The published run that is most like this one."""
        return calibration.nearest(self.gpu, self.sizes)

    @cached_property
    def residual(self) -> "Plan":
        """The same run with plain residuals."""
        recompute = replace(self.training.recompute, connections=False, stream_layers=0)
        return replace(
            self, shape=replace(self.shape, connection=None), training=replace(self.training, recompute=recompute)
        )

    @cached_property
    def slowdown_range(self) -> tuple[float, float]:
        """Time of a step over that with plain residuals, less 1: the least and the most.

        What both have in common is as fast in both. The range is that of all constants, those fitted without one of the
        models included, of the speed of the connections' kernels, and of a host that the device waits for or does not.
        """
        if self.shape.connection is None:
            return 0.0, 0.0
        kernels = "main" if self.training.main_kernels else "general"
        slowest = calibration.SLOWEST[kernels if self.training.fused_connections else "torch"]
        constants = [self.assumed] + [
            calibration.assumptions(self.gpu, self.training.products, without=model)
            for model in calibration.left_out_models()
        ]
        found = []
        for assumed, launch, share in product(constants, (1, 0), (1.0, slowest)):
            same = replace(assumed, launch=launch * assumed.launch)
            found.append(self._total(replace(same, connections=share)) / self.residual._total(same) - 1)
        return min(found), max(found)

    def _total(self, assumed: Assumptions) -> float:
        return step_time(self.work, self.training, self.layout, self.gpu, self.network, assumed).total

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
            "tokens_per_second_range": self.speed_range,
            "slower_than_residual": self.slowdown_range,
            "calibration": {
                "runs": calibration.all_runs(),
                "runs_on_this_gpu": calibration.runs_of(self.gpu),
                "nearest_run": asdict(self.nearest) if calibration.runs_of(self.gpu) else None,
            },
            "mfu": self.mfu,
            "target_tokens": self.training.target_tokens,
            "days": self.days,
            "checkpoint_bytes": {"weights": weights, "total": checkpoint},
            "checkpoints": sum(self.kept_checkpoints),
            "assumptions": asdict(self.assumed) | {"network_gb_per_second": self.network},
            "notes": list(self.notes),
        }
