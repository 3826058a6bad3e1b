"""Other topologies for the same model, batch and machine: which fit, how fast they would be, why the rest do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_fc.planning.layout import Layout
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.shape import Recompute, Shape, Training
from megatron_fc.planning.stages import EVENLY, Split

_MICRO_BATCHES = (1, 2, 4, 8)
_VIRTUAL = (1, 2, 4, 8)
_TOKENS_PER_CONTEXT_RANK = 4096  # fewer are not tried: sequences are short enough then


@dataclass(frozen=True)
class Sweep:
    """All that was tried.

    Attributes:
        base: the plan whose topology was replaced.
        fitting: plans in the order of their estimated speed, the fastest first; `base` among them if it fits.
        too_large: those that do not fit with full recompute either, the smallest first.
        impossible: by the rule that is broken, how many, and one of them in words.
    """

    base: Plan
    fitting: list[Plan]
    too_large: list[Plan]
    impossible: dict[str, tuple[int, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: all that fit, and how many do not."""
        return {
            "fitting": [
                {
                    "overrides": overrides(tried, self.base),
                    "memory_bytes": tried.memory.total,
                    "tokens_per_second": tried.tokens_per_second,
                    "days": tried.days,
                }
                for tried in self.fitting
            ],
            "too_large": len(self.too_large),
            "impossible": {rule: count for rule, (count, _) in self.impossible.items()},
        }


def sweep(plan: Plan) -> Sweep:
    """Try the plan itself, and other TP, PP, VPP, EP, CP and micro-batches, each with the least recompute that fits."""
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    impossible: dict[str, tuple[int, str]] = {}
    recomputes = _recomputes(plan)
    for layout in _layouts(plan):
        problem = layout.problem() or _indivisible(plan.shape, layout) or _refused(plan.training, layout)
        if problem is not None:
            rule = problem.split("=")[0]
            impossible[rule] = impossible.get(rule, (0, ""))[0] + 1, problem
            continue
        divided = plan.training.sequence_parallel or layout.tensor > 1
        for recompute in recomputes:
            training = replace(
                plan.training,
                recompute=recompute,
                sequence_parallel=divided,
                overlap_tensor=plan.training.overlap_tensor and layout.tensor > 1,
                group=plan.training.group if layout == plan.layout else None,
            )
            tried = replace(plan, layout=layout, training=training)
            if tried.fits:
                fitting.append(tried)  # with more recompute it would be slower
                break
        else:
            too_large.append(tried)
    if plan.fits and plan not in fitting:  # e.g. another micro-batch
        fitting.insert(0, plan)
    return Sweep(
        plan,
        sorted(fitting, key=lambda tried: -tried.tokens_per_second),
        sorted(too_large, key=lambda tried: tried.memory.total),
        impossible,
    )


def overrides(plan: Plan, base: Plan) -> list[str]:
    """What to add to the command line of `base` to train as `plan` does."""
    new, old = plan.layout, base.layout
    settings: dict[str, tuple[object, object]] = {
        "tensor_model_parallel_size": (new.tensor, old.tensor),
        "pipeline_model_parallel_size": (new.pipeline, old.pipeline),
        "num_virtual_stages_per_pipeline_rank": (new.virtual_pipeline, old.virtual_pipeline),
        "context_parallel_size": (new.context, old.context),
        "expert_model_parallel_size": (new.expert, old.expert),
        "micro_batch_size": (new.micro_batch, old.micro_batch),
        "sequence_parallel": (plan.training.sequence_parallel, base.training.sequence_parallel),
        "tp_comm_overlap": (plan.training.overlap_tensor, base.training.overlap_tensor),
    }
    if new.tensor != old.tensor:  # what Megatron derives from TP stays as it is, and so the model
        settings["padded_vocab_size"] = plan.shape.vocabulary, None
        if new.experts:
            settings["expert_tensor_parallel_size"] = new.expert_tensor, None
    if new.split != old.split:
        settings["account_for_embedding_in_pipeline_split"] = new.split.with_embedding, old.split.with_embedding
        settings["account_for_loss_in_pipeline_split"] = new.split.with_loss, old.split.with_loss
    if base.pipeline_settings and new != old:
        settings["num_virtual_stages_per_pipeline_rank"] = new.virtual_pipeline, None
    words = [f"{name}={str(mine).lower()}" for name, (mine, theirs) in settings.items() if mine != theirs]
    if new != old:
        words += [f"{name}=null" for name in base.pipeline_settings]
    if plan.training.recompute != base.training.recompute:
        words += _recompute_words(plan.training.recompute, base.training.recompute)
    return words


def _recompute_words(recompute: Recompute, base: Recompute) -> list[str]:
    without = ["recompute_method=null", "recompute_num_layers=null"] if base.granularity == "full" else []
    if recompute.granularity == "none":
        return ["recompute_granularity=null", *without]
    if recompute.granularity == "selective":
        modules = ",".join(recompute.modules)
        return ["recompute_granularity=selective", f"recompute_modules=[{modules}]", *without]
    return [
        "recompute_granularity=full",
        f"recompute_method={recompute.method}",
        f"recompute_num_layers={recompute.layers}",
    ]


def _recomputes(plan: Plan) -> list[Recompute]:
    """From the fastest on: none, the MLP or the experts, whole layers.

    Neither experts nor whole layers run again where the experts' communication overlaps, and no whole layers where
    the stream does.
    """
    kinds = sorted({"moe" if moe else "mlp" for moe in plan.shape.moe_layers})
    plain = replace(plan.training.recompute, granularity="none", modules=(), method="uniform", layers=1)
    if plan.training.overlap_experts:
        return [plain]
    selective = replace(plain, granularity="selective", modules=tuple(kinds))
    return [plain, selective] if plain.stream_layers else [plain, selective, replace(plain, granularity="full")]


def _layouts(plan: Plan) -> Iterator[Layout]:
    layout, shape = plan.layout, plan.shape
    tensors = _powers_of_two(layout.gpus_per_node)
    virtuals = sorted({*_VIRTUAL, layout.virtual_pipeline})
    # Of the layers, or with embedding and loss counted as layers.
    most, counts = min(shape.layers, layout.world), range(shape.layers, shape.layers + 3)
    pipelines = [
        size for size in range(1, most + 1) if size == layout.pipeline or any(layers % size == 0 for layers in counts)
    ]
    contexts = _powers_of_two(max(shape.sequence // _TOKENS_PER_CONTEXT_RANK, 1))
    experts = _powers_of_two(shape.experts) if shape.experts else [1]
    for tensor, pipeline, virtual, context, expert, micro_batch in product(
        tensors, pipelines, virtuals, contexts, experts, _MICRO_BATCHES
    ):
        if virtual > 1 and pipeline == 1:
            continue
        yield replace(
            layout,
            split=layout.split
            if (pipeline, virtual) == (layout.pipeline, layout.virtual_pipeline)
            else _split(shape.layers, pipeline * virtual),
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            expert=expert,
            expert_tensor=layout.expert_tensor if shape.experts else tensor,
            micro_batch=micro_batch,
        )


def _split(layers: int, stages: int) -> Split:
    """Even, or with the loss, or embedding and loss, counted as layers; even where none of them fits."""
    for counted in (EVENLY, Split(with_loss=True), Split(with_embedding=True, with_loss=True)):
        if (layers + counted.with_embedding + counted.with_loss) % stages == 0:
            return counted
    return EVENLY


def _powers_of_two(limit: int) -> list[int]:
    return [1 << power for power in range(limit.bit_length()) if 1 << power <= limit]


def _indivisible(shape: Shape, layout: Layout) -> str | None:
    """What a layout alone does not know: sizes of the model that tensor parallelism divides."""
    tensor, experts = "tensor_model_parallel_size", "expert_tensor_parallel_size"
    for name, size, by, parts in (
        ("num_query_groups", shape.groups, tensor, layout.tensor),
        ("padded_vocab_size", shape.vocabulary, tensor, layout.tensor),
        ("ffn_hidden_size", 0 if all(shape.moe_layers) else shape.ffn, tensor, layout.tensor),
        ("moe_shared_expert_intermediate_size", shape.shared_ffn, tensor, layout.tensor),
        ("moe_ffn_hidden_size", shape.expert_ffn, experts, layout.expert_tensor),
    ):
        if size % parts:
            return f"{name}={size} is not divided by {by}={parts}"
    return None


def _refused(training: Training, layout: Layout) -> str | None:
    """What a layout alone does not know: rules of Megatron's schedules."""
    if layout.virtual_pipeline > 1 and layout.accumulation_steps % layout.pipeline:
        return (
            f"global_batch_size={layout.global_batch} gives each rank {layout.accumulation_steps} micro-batches, which "
            f"virtual stages want to be a multiple of pipeline_model_parallel_size={layout.pipeline}"
        )
    if training.overlap_experts and layout.expert == 1:
        return "expert_model_parallel_size=1 has nothing for overlap_moe_expert_parallel_comm"
    if training.overlap_experts and layout.pipeline > layout.virtual_pipeline == 1:
        return (
            f"pipeline_model_parallel_size={layout.pipeline} needs virtual stages for overlap_moe_expert_parallel_comm"
        )
    return None
