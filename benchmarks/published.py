"""Rows of published Megatron throughput as planning sees them: public shape, the row's layout and recipe."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fc.planning.calibration import Assumptions
from megatron_fc.planning.devices import device
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.shape import Latent, Recompute, Shape, Training
from megatron_fc.planning.stages import EVENLY, Split, parsed

_LLAMA = Shape((), 4096, 32, 8, 128, 14336, 128256, 8192)
_QWEN = Shape((), 2048, 32, 4, 128, 6144, 151936, 4096, experts=128, top_k=8, expert_ffn=768, qk_norm=True)
_DEEPSEEK = Shape(
    (False,) * 3 + (True,) * 58,
    7168,
    128,
    128,
    192,
    18432,
    129280,
    4096,
    experts=256,
    top_k=8,
    expert_ffn=2048,
    shared_ffn=2048,
    qk_norm=True,
    latent=Latent(1536, 512, 64, 128),
    predicted=1,
)
# Public Hugging Face configs.
MODELS = {
    "LLAMA3_8B": replace(_LLAMA, moe_layers=(False,) * 32),
    "LLAMA3_70B": replace(_LLAMA, moe_layers=(False,) * 80, width=8192, heads=64, ffn=28672),
    "LLAMA31_405B": replace(_LLAMA, moe_layers=(False,) * 126, width=16384, heads=128, ffn=53248),
    "Qwen3_30B_a3B": replace(_QWEN, moe_layers=(True,) * 48),
    "Qwen3_235B_a22B": replace(_QWEN, moe_layers=(True,) * 94, width=4096, heads=64, expert_ffn=1536),
    "GPT OSS 120B": Shape(
        (True,) * 36,
        2880,
        64,
        8,
        64,
        2880,
        201088,
        4096,
        experts=128,
        top_k=4,
        expert_ffn=2880,
        linear_bias=True,
        clamped=True,
        window=128,
        windowed=(True, False) * 18,
    ),
    "DeepSeekV3": _DEEPSEEK,
    "DeepSeekV3 (w/o MTP)": replace(_DEEPSEEK, predicted=0),
    "Kimi_K2": replace(
        _DEEPSEEK, moe_layers=(False,) + (True,) * 60, heads=64, groups=64, experts=384, vocabulary=163840, predicted=0
    ),
}
_STAGES = {
    # Of DeepSeek-V3 and Kimi K2, by number of stages; prediction is left out where the model has none.
    8: "Et*7|(t*8|)*6t*6mL",
    16: "Et*4|(t*4|)*14tmL",
    32: "Et|(tt|)*30mL",
}
BEFORE = Assumptions(compute=0.55, compute_half=0.55, memory=0.75, nvlink=0.6, network=0.6, launch=40)
SPLITS = (EVENLY, Split(with_embedding=True, with_loss=True))  # of other models, the first that fits
_NVIDIA_NODE = {"H100": 8, "B200": 8, "B300": 8, "GB200": 4, "GB300": 4}


@dataclass(frozen=True, eq=False)
class Row:
    """A published row.

    Attributes:
        release: of NVIDIA's container.
        system, model: as printed.
        precision: as printed.
        plan: of it, with constants that a fit replaces.
        published: tokens per second and GPU.
        has_regression: the source says that a bug of the release slowed this run.
    """

    release: tuple[int, ...]
    system: str
    model: str
    precision: str
    plan: Plan
    published: float
    has_regression: bool = False

    @property
    def is_recent(self) -> bool:
        """From release 26.04 on."""
        return self.release >= (26, 4)

    @property
    def family(self) -> str:
        """Of the model, whose sizes and variants are left out together."""
        return self.model.split("_")[0].split(" ")[0].rstrip("0123456789")

    @property
    def name(self) -> str:
        release = ".".join(f"{part:02d}" for part in self.release)
        return f"{release} {self.system} {self.model} {self.precision}"


def rows(path: Path) -> list[Row]:
    """All rows of a file with the columns of `published-throughput.csv`."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(_rows(csv.DictReader(file)))


def _rows(table: "csv.DictReader[str]") -> Iterator[Row]:
    for printed in table:
        cells = _as_in_the_recipe(printed)
        release = tuple(int(part) for part in cells["release"].split("."))
        shape, gpu = replace(MODELS[cells["model"]], sequence=int(cells["seq"])), device(cells["system"])
        layout = _layout(cells, shape)
        training = _training(cells, release, layout)
        plan = Plan(cells["model"], shape, training, layout, gpu, gpu.network_gb_per_second, BEFORE)
        names = cells["system"], cells["model"], cells["precision"]
        yield Row(release, *names, plan, float(cells["tokens_per_s_gpu"]), "[^" in cells["tflops"])


def _as_in_the_recipe(cells: dict[str, str]) -> dict[str, str]:
    """Two rows of Llama 3 70B with what their release's recipe has: as printed, neither fits its GPU's memory.

    One has neither pipeline nor FSDP, and so all weights on each GPU; one a pipeline of 4 with micro-batches of 2 and
    no virtual stages, and so 378 GB of activations.
    """
    if cells["model"] == "LLAMA3_70B" and cells["pp"] == cells["tp"] == "1":
        return cells | {"fsdp": cells["gpus"]}
    if cells["model"] == "LLAMA3_70B" and cells["pp"] == "4" and not cells["vp"]:
        return cells | {"vp": "5", "mbs": "1"}
    return cells


def _layout(cells: dict[str, str], shape: Shape) -> Layout:
    def size(name: str) -> int:
        return int(cells[name] or 1)

    node = min(_NVIDIA_NODE[cells["system"]], size("gpus"))
    pipeline, virtual, split = size("pp"), size("vp"), EVENLY
    text = _STAGES.get(pipeline * virtual)
    if pipeline > 1 and shape.latent and text:
        split = Split(stages=parsed(text if shape.predicted else text.replace("m", "")))
    elif pipeline > 1:
        if shape.layers % pipeline == 0 and shape.layers % (pipeline * virtual):
            virtual = 1  # a column of the table that the row's own sizes contradict
        split = next(tried for tried in SPLITS if tried.problem(shape.layers, pipeline, virtual) is None)
    else:
        virtual = 1
    return Layout(
        nodes=size("gpus") // node,
        gpus_per_node=node,
        tensor=size("tp"),
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=size("cp"),
        expert=size("ep") if shape.experts else 1,
        micro_batch=size("mbs"),
        global_batch=size("gbs"),
        heads=shape.heads,
        layers=shape.layers,
        experts=shape.experts,
        split=split,
    )


def _training(cells: dict[str, str], release: tuple[int, ...], layout: Layout) -> Training:
    """The recipe of Megatron-Bridge at the release, as far as it is known."""
    precision = cells["precision"]
    products = "fp4" if "FP4" in precision else "fp8" if "FP8" in precision else "half"
    fsdp = bool(cells["fsdp"])
    graphs, modules, overlap = _graphs(cells, release)
    return Training(
        gradient_bytes=2,
        fused_loss=True,
        fp8_output=products == "fp8" and graphs == ("all",) and bool(layout.experts),
        fused_experts=graphs == ("all",) and bool(layout.experts),
        sends_once=layout.expert > 1 and _sends_once(cells, release),
        offloaded={"GB300": 20, "GB200": 40}.get(cells["system"], 0) if fsdp else 0,
        sequence_parallel=layout.tensor > 1,
        shard_gradients=fsdp,
        shard_weights=fsdp,
        recompute=Recompute("selective", modules) if modules else Recompute(),
        products=products,
        tensor_scales=precision in ("FP8", "FP8-CS"),
        transposes=cells["system"] == "H100",
        overlap_tensor=layout.tensor > 1,
        overlap_experts=overlap,
        captured=graphs,
        target_tokens=10**12,
    )


def _sends_once(cells: dict[str, str], release: tuple[int, ...]) -> bool:
    """HybridEP or DeepEP; GPT-OSS took it later, and not on all systems."""
    if cells["model"].startswith("GPT"):
        return release >= (26, 6) or cells["system"] == "B300"
    return True


def _graphs(cells: dict[str, str], release: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Captured modules, recomputed ones, overlap of the experts' communication."""
    model, system, micro_batch = cells["model"], cells["system"], int(cells["mbs"])
    part, blackwell = ("attn", "moe_router", "moe_preprocess"), system != "H100"
    if model.startswith("LLAMA"):
        return (("all",) if model == "LLAMA3_8B" else ()), (), False
    whole = release >= (26, 6) and blackwell
    if model.startswith(("DeepSeek", "Kimi")):
        if whole and not (system == "B300" and micro_batch == 2):
            return ("all",), (() if system == "GB300" else ("mla_up_proj",)), True
        if system == "B200" and cells["pp"] == "8":
            return part, ("mla_up_proj", "mlp"), True
        captured = part if system == "GB200" or (system == "B300" and cells["pp"] == "8") else ()
        return captured, ("mlp",) if system == "GB200" else ("mla_up_proj",), False
    if model.startswith("GPT"):
        again = () if whole or system in ("GB300", "B300") else ("layernorm", "moe_act")
        if whole:
            return ("all",), again, True
        return (part if system in ("GB300", "B300") else ()), again, system == "GB200" and release >= (26, 4)
    if whole:
        return ("all",), (), True
    return (part[1:] if blackwell and release >= (26, 2) else ()), (), False
