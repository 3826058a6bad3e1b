"""The parallel layout of a job's ranks: whether it is possible, and what fits instead.

The rules are those of Megatron's `validate_args`, `initialize_model_parallel` and MoE layer, as far as they depend on
sizes alone. They are kept here, apart, because a refusal has to list what would be possible.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_fc.errors import UserError
from megatron_fc.planning.stages import EVENLY, Chunk, Split, chunks

_NODES_TRIED = range(1, 129)
_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A world of ranks and how a model is spread over it; data parallelism takes the rest.

    Args:
        nodes: number of nodes.
        gpus_per_node: ranks on each of them.
        tensor: tensor parallel size (TP).
        pipeline: pipeline parallel size (PP).
        virtual_pipeline: stages per pipeline rank (VPP).
        context: context parallel size (CP).
        expert: expert parallel size (EP).
        expert_tensor: tensor parallel size of experts (ETP).
        micro_batch: sequences per rank and pass.
        global_batch: sequences per step.
        heads: attention heads.
        layers: of the decoder; None for a hybrid model, whose pattern has other rules.
        experts: per MoE layer, 0 for a dense model.
        split: of the layers among the stages.
    """

    nodes: int
    gpus_per_node: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    micro_batch: int
    global_batch: int
    heads: int
    layers: int | None
    experts: int = 0
    split: Split = EVENLY

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def data(self) -> int:
        """Data parallel size (DP): copies of the model, each on sequences of its own."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank and step."""
        return self.global_batch // (self.micro_batch * self.data)

    def chunks(self, stage: int) -> tuple[Chunk, ...]:
        """What a pipeline rank holds, by its model chunks."""
        assert self.layers is not None
        return chunks(self.layers, self.pipeline, self.virtual_pipeline, self.split)[stage]

    @property
    def layers_of_stages(self) -> list[int]:
        """Layers of every pipeline stage, in the order in which tokens pass them; empty for a hybrid model."""
        if self.layers is None:
            return []
        ranks = [self.chunks(stage) for stage in range(self.pipeline)]
        return [len(rank[chunk].layers) for chunk in range(self.virtual_pipeline) for rank in ranks]

    def __str__(self) -> str:
        sizes = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        if self.context > 1:
            sizes.append(f"CP{self.context}")
        if self.experts:
            sizes += [f"EP{self.expert}", f"ETP{self.expert_tensor}"]
        return " ".join(sizes)

    def refuse_impossible(self) -> None:
        """Check the layout.

        Raises:
            UserError: it is impossible; names the field, its value, and the layouts that are possible.
        """
        self._refuse_sizes_below_one()
        problem = self.problem()
        if problem is None:
            return
        if self.split.stages and problem == self._problem_of_stages():
            raise UserError(problem)  # no other size suits a string that does not fit the model
        nodes = [str(n) for n in _NODES_TRIED if replace(self, nodes=n).problem() is None]
        others = [str(layout) for layout in self._others()]
        raise UserError(
            f"{problem}; possible with {self}: {_listed(nodes, 'no number of')} nodes; "
            f"possible on {self._machine}: {_listed(others, 'none')}"
        )

    def problem(self) -> str | None:
        """The first rule that is broken, as the field, its value and why; None if the layout is possible."""
        return next(self._broken_rules(), None)

    def _problem_of_stages(self) -> str | None:
        return None if self.layers is None else self.split.problem(self.layers, self.pipeline, self.virtual_pipeline)

    def _refuse_sizes_below_one(self) -> None:
        for name, size in (
            ("nodes", self.nodes),
            ("gpus_per_node", self.gpus_per_node),
            ("tensor_model_parallel_size", self.tensor),
            ("pipeline_model_parallel_size", self.pipeline),
            ("context_parallel_size", self.context),
            ("expert_model_parallel_size", self.expert),
            ("expert_tensor_parallel_size", self.expert_tensor),
            ("micro_batch_size", self.micro_batch),
            ("global_batch_size", self.global_batch),
        ):
            if size < 1:
                raise UserError(f"{name}={size} must be at least 1")

    def _broken_rules(self) -> Iterator[str]:
        if self.heads % self.tensor:
            yield f"tensor_model_parallel_size={self.tensor} does not divide num_attention_heads={self.heads}"
        if problem := self._problem_of_stages():
            yield problem
        if self.expert > 1 and not self.experts:
            yield f"expert_model_parallel_size={self.expert} needs experts, and num_experts is not set"
        if self.experts % self.expert:
            yield f"expert_model_parallel_size={self.expert} does not divide num_experts={self.experts}"
        model = self.tensor * self.pipeline * self.context
        if self.world % model:
            yield self._misfit(
                {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context},
                f"TP{self.tensor} x PP{self.pipeline} x CP{self.context} = {model}",
            )
            return  # the rest counts copies of the model
        experts = self.expert_tensor * self.expert * self.pipeline
        if self.experts and self.world % experts:
            yield self._misfit(
                {"expert": self.expert, "expert_tensor": self.expert_tensor, "pipeline": self.pipeline},
                f"PP{self.pipeline} x ETP{self.expert_tensor} x EP{self.expert} = {experts}",
            )
        if self.global_batch % (self.micro_batch * self.data):
            yield (
                f"global_batch_size={self.global_batch} does not fit {self._machine}: it is no multiple of "
                f"micro_batch_size {self.micro_batch} x DP{self.data}"
            )
        if self.virtual_pipeline > 1 and self.accumulation_steps < self.pipeline:
            yield (
                f"global_batch_size={self.global_batch} gives each rank {self.accumulation_steps} micro-batches, and "
                f"virtual stages need at least pipeline_model_parallel_size={self.pipeline}"
            )

    @property
    def _machine(self) -> str:
        return f"{_count(self.nodes, 'node')} of {_count(self.gpus_per_node, 'GPU')}"

    def _misfit(self, sizes: dict[str, int], product_of_sizes: str) -> str:
        field = max(sizes, key=lambda name: sizes[name])
        name = f"{field}_parallel_size" if field in ("context", "expert_tensor") else f"{field}_model_parallel_size"
        return (
            f"{name}={sizes[field]} does not fit {self._machine}: "
            f"{self.world} ranks are no multiple of {product_of_sizes}"
        )

    def _others(self) -> list["Layout"]:
        """Possible layouts of the same model, batch and nodes, those that change least first."""
        tensors = [size for size in _divisors(self.heads) if size <= self.gpus_per_node]
        pipelines = _divisors((self.layers or self.pipeline) // self.virtual_pipeline)
        experts = _divisors(self.experts) if self.experts else [1]
        found = []
        for tensor, pipeline, expert in product(tensors, pipelines, experts):
            expert_tensor = tensor if self.expert_tensor == self.tensor else self.expert_tensor
            layout = replace(self, tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)
            if layout.problem() is None:
                found.append(layout)
        return sorted(found, key=self._distance)

    def _distance(self, other: "Layout") -> tuple[int, int]:
        pairs = [(self.tensor, other.tensor), (self.pipeline, other.pipeline), (self.expert, other.expert)]
        changed = [(mine, theirs) for mine, theirs in pairs if mine != theirs]
        return len(changed), sum(max(mine, theirs) // min(mine, theirs) for mine, theirs in changed)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listed(words: list[str], none: str) -> str:
    return ", ".join(words[:_LISTED]) + (" ..." if len(words) > _LISTED else "") if words else none
