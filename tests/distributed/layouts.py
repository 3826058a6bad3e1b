"""The parallel layouts and the models that the distributed tests combine."""

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state

from megatron_fc import FracConfig

LAYERS = 4


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks."""

    name: str
    world: int
    tp: int = 1
    sequence: bool = False
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    cp: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False

    @property
    def expert_tp(self) -> int | None:
        # gloo has no uneven all-gather, which experts split over tensor ranks need.
        return 1 if self.ep > 1 else None

    def initialise(self) -> None:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.expert_tp,
        )

    def options(self) -> dict[str, Any]:
        """What TransformerConfig has to know."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.sequence,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.expert_tp,
            "context_parallel_size": self.cp,
            "batch_p2p_comm": False,
            "overlap_p2p_comm": self.vpp is not None,
            "deallocate_pipeline_outputs": True,
        }


ONE_RANK = Layout("1 rank", 1)
LAYOUTS = (
    Layout("TP2", 2, tp=2),
    Layout("TP2+SP", 2, tp=2, sequence=True),
    Layout("PP2", 2, pp=2),
    Layout("PP2+VPP2", 2, pp=2, vpp=2),
    Layout("PP4", 4, pp=4),
    Layout("EP2", 2, ep=2),
    Layout("TP2+SP+EP2", 2, tp=2, sequence=True, ep=2),
    Layout("TP2+SP+PP2", 4, tp=2, sequence=True, pp=2),
    Layout("CP2", 2, cp=2),
    Layout("DP2", 2),
    Layout("DP2 distributed optimizer", 2, distributed_optimizer=True),
    Layout("DP2 distributed optimizer, overlap", 2, distributed_optimizer=True, overlap=True),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Model:
    """What is trained: kind of model (`tiny.KINDS`), connections, their start, precision."""

    kind: str
    frac: FracConfig | None
    start: str
    bf16: bool = False

    @property
    def name(self) -> str:
        return "-".join(
            [self.kind, self.frac.label if self.frac else "residual", self.start, "bf16" if self.bf16 else "fp32"]
        )


FRACS = tuple(FracConfig(rate=rate, dynamic=dynamic) for rate in (2, 4) for dynamic in (True, False))


def models(kind: str) -> tuple[Model, ...]:
    """Both connections, both rates, both starts in fp32; two of them in bf16."""
    fp32 = [Model(kind, frac, start) for frac in FRACS for start in ("paper", "random")]
    return (*fp32, *(Model(kind, frac, "random", bf16=True) for frac in FRACS[1:3]))


# A dense layer before MoE layers; Megatron refuses to train MoE under tensor without sequence parallelism.
MOE, DENSE = models("mixed"), models("dense")
OTHER_KINDS = tuple(Model(kind, FracConfig(rate=4), "random") for kind in ("mla", "mtp", "hybrid"))


def models_of(layout: Layout) -> tuple[Model, ...]:
    """What the layout is tested with."""
    if layout.name == "TP2":
        return DENSE
    return (*MOE, *OTHER_KINDS) if layout.name == "TP2+SP+PP2" else MOE
