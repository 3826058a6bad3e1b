"""The parallel layouts and the models that the distributed tests combine."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.norm_options import MEGATRON_NORMS, NormOptions


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks; `stages` as Megatron's pipeline_model_parallel_layout.

    `exchanges_shapes`: nobody calls `widen`.
    """

    name: str
    world: int
    tp: int = 1
    sequence: bool = False
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    cp: int = 1
    stages: str | None = None
    exchanges_shapes: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False

    @property
    def expert_tp(self) -> int | None:
        # gloo has no uneven all-gather, which experts split over tensor ranks need.
        return 1 if self.ep > 1 else None

    @property
    def layers(self) -> int:
        """A layer per pipeline stage, and a dense layer before a MoE layer in any case."""
        if self.stages:
            return self.stages.count("t")
        return max(2, self.pp * (self.vpp or 1))

    def initialise(self) -> None:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.expert_tp,
            # Multi-token prediction needs the embedding, too.
            get_embedding_ranks=(lambda ranks: [ranks[0], *ranks[-2:]]) if "m|" in (self.stages or "") else None,
        )

    def options(self) -> dict[str, Any]:
        """What TransformerConfig has to know."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.sequence,
            "pipeline_model_parallel_size": self.pp,
            "pipeline_model_parallel_layout": self.stages,
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
    Layout("PP2, shapes exchanged", 2, pp=2, exchanges_shapes=True),
    Layout("PP2+VPP2, shapes exchanged", 2, pp=2, vpp=2, exchanges_shapes=True),
    Layout("PP4", 4, pp=4),
    Layout("EP2", 2, ep=2),
    Layout("TP2+SP+EP2", 2, tp=2, sequence=True, ep=2),
    Layout("TP2+SP+PP2", 4, tp=2, sequence=True, pp=2),
    Layout("PP2+EP2", 4, pp=2, ep=2),
    Layout("E|tt|tt|L", 4, pp=4, stages="E|tt|tt|L"),
    Layout("Ett|tt|m|L", 4, pp=4, stages="Ett|tt|m|L"),
    Layout("CP2", 2, cp=2),
    Layout("DP2", 2),
    Layout("DP2 distributed optimizer", 2, distributed_optimizer=True),
    Layout("DP2 distributed optimizer, overlap", 2, distributed_optimizer=True, overlap=True),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Model:
    """What is trained: kind of model (`tiny.KINDS`), layers, connections, start, precision, tied embeddings, norms."""

    kind: str
    layers: int
    connection: ConnectionConfig
    start: str
    bf16: bool = False
    tied: bool = False
    norms: NormOptions = MEGATRON_NORMS

    @property
    def steps(self) -> int:
        """Ten where Frac-, Hyper-Connections and mHC are shown to learn, fewer where that is repeated."""
        learns = self.kind in ("mixed", "dense") and self.connection in (DFC, SFC, DHC, MHC)
        return 10 if learns and not self.bf16 and self.norms == MEGATRON_NORMS else 4

    @property
    def name(self) -> str:
        leave = "-learned" if getattr(self.connection, "leave", "mean") == "learned" else ""
        norms = "".join(f"-{name}" for name, value in asdict(self.norms).items() if value)
        precision = "bf16" if self.bf16 else "fp32"
        return f"{self.kind}{self.layers}-{self.connection.label}{leave}-{self.start}-{precision}{norms}"

    def options(self) -> dict[str, Any]:
        """What TransformerConfig has to know."""
        # Every layer of a hybrid model is one sub-layer.
        options: dict[str, Any] = {"num_layers": self.layers * (2 if self.kind == "hybrid" else 1)}
        if self.kind in ("mixed", "hybrid"):
            options |= {"moe_layer_freq": [0] + [1] * (self.layers - 1), "moe_router_dtype": "fp32"}
        if self.norms.qk_layernorm_over_heads:
            options["qk_layernorm"] = True
            if self.kind in ("dense", "moe"):
                options["num_query_groups"] = 2
        if self.kind == "moe":
            options["moe_router_pre_softmax"] = True
        if self.bf16:
            options |= {"bf16": True, "params_dtype": torch.bfloat16}
        return {**options, "pipeline_dtype": torch.bfloat16 if self.bf16 else torch.float32}


DFC, SFC = FracConfig(rate=4), FracConfig(rate=2, dynamic=False)
DHC, MHC = HyperConfig(slots=4), ManifoldConfig(slots=4)
LEARNED = ManifoldConfig(slots=4, leave="learned")
OLMOE, OLMO2 = NormOptions(qk_layernorm_over_heads=True), NormOptions(qk_layernorm_over_heads=True, norm_after=True)
# Those that one layout alone is tested with, the one in which most comes together.
OTHERS = (
    FracConfig(rate=2),
    FracConfig(rate=4, dynamic=False),
    HyperConfig(slots=4, dynamic=False),
    HyperConfig(slots=4, fractions=2),
    LEARNED,
    ManifoldConfig(slots=4, fractions=4),
)


def models(kind: str, layers: int) -> tuple[Model, ...]:
    """Frac-Connections of both kinds, Hyper-Connections and mHC; two also from the paper's start; three in bf16."""
    fp32 = [Model(kind, layers, connection, "random") for connection in (DFC, SFC, DHC, MHC)]
    fp32 += [Model(kind, layers, connection, "paper") for connection in (DFC, DHC)]
    return (*fp32, *(Model(kind, layers, connection, "random", bf16=True) for connection in (DFC, DHC, MHC)))


# A dense layer before MoE layers; Megatron refuses to train MoE under tensor without sequence parallelism.
MOE = {layers: models("mixed", layers) for layers in sorted({layout.layers for layout in LAYOUTS})}
DENSE = (*models("dense", 2), Model("dense", 2, DHC, "random", norms=OLMO2))
OTHER_KINDS = tuple(
    Model(kind, 2, connection, "random") for kind in ("mla", "mtp", "hybrid") for connection in (DFC, DHC)
)
OTHER_KINDS += tuple(Model("mixed", 2, connection, "random") for connection in OTHERS)
OTHER_KINDS += tuple(Model(kind, 2, LEARNED, "random") for kind in ("mtp", "hybrid"))
OTHER_KINDS += (Model("mixed", 2, DFC, "random", norms=OLMOE), Model("mixed", 2, DHC, "random", norms=OLMO2))
# Stages without a layer are a matter of streams that are wider than the model.
WIDE = tuple(Model("mixed", 4, connection, "random") for connection in (DHC, LEARNED))
WIDE += (Model("hybrid", 4, DHC, "random"),)
WIDE += tuple(Model("mtp", 4, connection, "random", tied=True) for connection in (DHC, LEARNED))
ALL_MODELS = tuple(dict.fromkeys([model for group in (*MOE.values(), DENSE, OTHER_KINDS, WIDE) for model in group]))


def models_of(layout: Layout) -> tuple[Model, ...]:
    """What the layout is tested with."""
    if layout.name == "TP2":
        return DENSE
    if layout.exchanges_shapes:
        return tuple(Model(kind, layout.layers, DHC, "random") for kind in ("mixed", "hybrid"))
    if layout.stages:
        kind = "mtp" if "m" in layout.stages else "mixed"
        return tuple(model for model in WIDE if model.kind == kind)
    moe = MOE[layout.layers]
    if layout.name.startswith("DP2 distributed"):  # which sees parameters, whatever they are of
        return tuple(model for model in moe if model.start == "random" and model.connection != SFC)
    return (*moe, *OTHER_KINDS) if layout.name == "TP2+SP+PP2" else moe


def optimizer_of(layout: Layout, model: Model) -> str:
    """Adam from the paper's start; from a random one, where it amplifies rounding, SGD, unless Megatron refuses it."""
    return "adam" if layout.distributed_optimizer or model.start == "paper" else "sgd"


def optimizers_of(layout: Layout, model: Model) -> list[str]:
    """What to train with: one rank with everything that another layout is compared with."""
    if layout != ONE_RANK:
        return [optimizer_of(layout, model)]
    return sorted({optimizer_of(other, model) for other in LAYOUTS if model in models_of(other)})


def model_named(name: str) -> Model:
    return next(model for model in ALL_MODELS if model.name == name)
