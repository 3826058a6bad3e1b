"""What a config means on a number of nodes, worked out by Megatron itself on a machine that may have no GPU."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.layout import Layout
from megatron_fc.megatron.environment import has_transformer_engine
from megatron_fc.megatron.recipe import Recipe, load_recipe, refuse_missing_files
from megatron_fc.megatron.refusals import refuse_unsupported_args
from megatron_fc.megatron.setup import model_config, parse

# Speed alone; Megatron refuses them where it finds no Transformer Engine, before it checks the rest.
_TE_FUSIONS = ("apply_rope_fusion", "moe_permute_fusion")
_NAMES_TE = re.compile(r"\bTE\b|(?i:transformer[- _]engine)")


@dataclass(frozen=True)
class Throughput:
    """What an estimate of GPU-hours rests on: a measured speed, or else an assumed share of the peak.

    Attributes:
        tokens_per_second: per GPU, measured by the user; None assumes `mfu`.
        mfu: model FLOPs utilisation, the share of the peak that the model's own arithmetic reaches.
        peak_tflops: per GPU, dense bf16, of a data sheet.
    """

    tokens_per_second: float | None = None
    mfu: float = 0.3
    peak_tflops: float = 989.0  # H100 and H200 SXM

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be greater than 0")

    def seconds_per_token(self, flops: float | None) -> float | None:
        """GPU time of one token; None if it rests on FLOPs per token that are not known."""
        if self.tokens_per_second is not None:
            return 1 / self.tokens_per_second
        return None if flops is None else flops / (self.mfu * self.peak_tflops * 1e12)

    def __str__(self) -> str:
        if self.tokens_per_second is not None:
            return f"at the given {self.tokens_per_second:,.0f} tokens/s per GPU"
        return (
            f"assuming {self.mfu:.0%} of {self.peak_tflops:,.0f} TFLOP/s per GPU, an assumption and no measurement: "
            f"give --tokens-per-second-per-gpu"
        )


@dataclass(frozen=True)
class Topology:
    """A run on its nodes.

    Attributes:
        layout: sizes of all kinds of parallelism.
        sequence: tokens per sequence.
        steps: optimizer steps of the whole run.
        target_tokens: that the config asks for; Megatron leaves out what does not fill a last batch.
        flops_per_token: forward and backward, by Megatron's count; None without vocab_size.
        throughput: basis of the GPU-hours.
        unchecked: what this machine could not check, in words.
    """

    layout: Layout
    sequence: int
    steps: int
    target_tokens: int
    flops_per_token: float | None
    throughput: Throughput
    unchecked: list[str]

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch * self.sequence

    @property
    def tokens(self) -> int:
        """That are trained in all."""
        return self.steps * self.tokens_per_step

    @property
    def gpu_hours(self) -> float | None:
        seconds = self.throughput.seconds_per_token(self.flops_per_token)
        return None if seconds is None else self.tokens * seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, sizes under Megatron's names."""
        layout = self.layout
        return {
            "nodes": layout.nodes,
            "gpus_per_node": layout.gpus_per_node,
            "world_size": layout.world,
            "data_parallel_size": layout.data,
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
            "context_parallel_size": layout.context,
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.expert_tensor,
            "expert_data_parallel_size": layout.expert_data,
            "micro_batch_size": layout.micro_batch,
            "global_batch_size": layout.global_batch,
            "gradient_accumulation_steps": layout.accumulation_steps,
            "seq_length": self.sequence,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.steps,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "flops_per_token": self.flops_per_token,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_basis": str(self.throughput),
            "unchecked": self.unchecked,
        }

    def lines(self) -> list[str]:
        """Return the same for people."""
        layout = self.layout
        stages = f" VPP{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
        lines = [
            f"ranks      {layout.world} = nodes {layout.nodes} x GPUs {layout.gpus_per_node}",
            f"layout     DP{layout.data} TP{layout.tensor} PP{layout.pipeline}{stages} CP{layout.context}",
        ]
        if layout.experts:
            lines.append(f"experts    EP{layout.expert} ETP{layout.expert_tensor}, expert-DP{layout.expert_data}")
        lines += [
            f"batch      {layout.global_batch:,} sequences = micro-batch {layout.micro_batch} x DP{layout.data} x "
            f"{layout.accumulation_steps} accumulation steps",
            f"step       {self.tokens_per_step:,} tokens, {self.sequence:,} per sequence",
            f"run        {self.steps:,} steps, {self.tokens:,} tokens",
        ]
        if self.tokens != self.target_tokens:
            lines[-1] += f" (the target is {self.target_tokens:,}: whole batches only)"
        if self.flops_per_token is None:
            lines.append("compute    not known without vocab_size in the config")
        else:
            lines.append(
                f"compute    {self.flops_per_token:.3e} FLOPs per token, forward and backward, by Megatron's count, "
                f"which leaves out Frac-Connections"
            )
        if self.gpu_hours is not None:
            days = self.gpu_hours / layout.world / 24
            lines.append(f"GPU-hours  {self.gpu_hours:,.0f} in all, {days:,.1f} days, {self.throughput}")
        return lines + [f"note: {note}" for note in self.unchecked]


@dataclass(frozen=True)
class Validated:
    """A config that Megatron has checked in a world of some size.

    Attributes:
        recipe: the config.
        args: Megatron's arguments, with padded_vocab_size where vocab_size is set.
        layout: sizes of all kinds of parallelism.
        unchecked: what this machine could not check, in words.
    """

    recipe: Recipe
    args: Namespace
    layout: Layout
    unchecked: list[str]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.args.train_iters or self.args.train_samples // self.args.global_batch_size)

    @property
    def target_tokens(self) -> int:
        """That the config asks for."""
        samples = self.args.train_samples or self.args.train_iters * self.args.global_batch_size
        return int(samples * self.args.seq_length)


def validate(
    config: Path, overrides: Sequence[str], nodes: int, gpus_per_node: int, *, check_files: bool = False
) -> Validated:
    """Let Megatron check a config for a number of nodes; needs no GPU.

    Args:
        config: the YAML file.
        overrides: as in `load_recipe`.
        nodes: number of nodes.
        gpus_per_node: ranks per node.
        check_files: data, tokenizer and room for checkpoints are to be here, as on a login node.

    Raises:
        UserError: the layout is impossible (with the possible ones), a file or room is missing, or Megatron refuses
            arguments.
    """
    recipe = load_recipe(config, overrides, elsewhere=True)
    layouts: list[Layout] = []

    def check(args: Namespace) -> None:
        if recipe.frac is not None:
            refuse_unsupported_args(args, on_gpu=True)
        layouts.append(layout_of(args, nodes, gpus_per_node))
        layouts[0].refuse_impossible()

    with _world_of(max(nodes * gpus_per_node, 1)):
        args = parse(recipe, check)
    if check_files:
        _refuse_missing(recipe, args)
    set_padded_vocabulary(args)
    return Validated(recipe, args, layouts[0], _check_model(args, recipe))


def topology(
    config: Path,
    overrides: Sequence[str],
    nodes: int,
    gpus_per_node: int,
    throughput: Throughput,
    *,
    check_files: bool = False,
) -> Topology:
    """Check a config for a number of nodes and work out what it comes to; needs no GPU.

    Args:
        config, overrides, nodes, gpus_per_node, check_files: as in `validate`.
        throughput: basis of the GPU-hours.

    Raises:
        UserError: as `validate`.
    """
    run = validate(config, overrides, nodes, gpus_per_node, check_files=check_files)
    return Topology(
        layout=run.layout,
        sequence=run.args.seq_length,
        steps=run.steps,
        target_tokens=run.target_tokens,
        flops_per_token=_flops_per_token(run.args),
        throughput=throughput,
        unchecked=run.unchecked,
    )


def _refuse_missing(recipe: Recipe, args: Namespace) -> None:
    from megatron_fc.megatron.room import room_of  # which takes a run as it is validated here

    refuse_missing_files(args)
    if room := room_of(recipe, args):
        room.check()


@contextmanager
def _world_of(size: int) -> Iterator[None]:
    """Let Megatron take this process for the first rank of a world."""
    names = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def layout_of(args: Namespace, nodes: int, gpus_per_node: int) -> Layout:
    """Return the layout that arguments ask for, whether Megatron has validated them or not.

    Raises:
        UserError: something that a layout needs is not set.
    """
    if args.step_batch_size_schedule is not None:
        raise UserError("step_batch_size_schedule changes the batch: topology needs one global_batch_size instead")
    if not (args.train_samples or args.train_iters):
        raise UserError("the run has no end: set train_samples or train_iters")
    for name in ("micro_batch_size", "global_batch_size", "num_attention_heads"):
        if getattr(args, name) is None:
            raise UserError(f"{name} is not set: set it")
    per_stage = args.num_layers_per_virtual_pipeline_stage
    stages = args.num_virtual_stages_per_pipeline_rank or 1
    if per_stage and args.num_layers:
        stages = max(args.num_layers // (per_stage * args.pipeline_model_parallel_size), 1)
    is_uneven = any(
        (
            args.hybrid_layer_pattern,
            args.pipeline_model_parallel_layout,
            args.decoder_first_pipeline_num_layers,
            args.decoder_last_pipeline_num_layers,
            args.account_for_embedding_in_pipeline_split,
            args.account_for_loss_in_pipeline_split,
        )
    )
    return Layout(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual_pipeline=stages,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        heads=args.num_attention_heads,
        layers=None if is_uneven else args.num_layers,
        experts=args.num_experts or 0,
    )


def set_padded_vocabulary(args: Namespace) -> None:
    """As Megatron does when it has read the tokenizer, which need not be on this machine."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if args.padded_vocab_size is None and args.vocab_size is not None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
        )


def _flops_per_token(args: Namespace) -> float | None:
    from megatron.training.training import num_floating_point_operations

    if args.padded_vocab_size is None:
        return None
    return float(num_floating_point_operations(args, 1)) / args.seq_length


def _check_model(args: Namespace, recipe: Recipe) -> list[str]:
    """Let Megatron check its model config; returns what it could not check without Transformer Engine."""
    from megatron.training.argument_utils import hybrid_config_from_args

    if args.padded_vocab_size is None:
        return ["Megatron's model config was not checked, which needs vocab_size in the config"]
    if not has_transformer_engine():
        for name in _TE_FUSIONS:
            setattr(args, name, False)
    try:
        if recipe.family == "hybrid":
            hybrid_config_from_args(args)  # its stack of layers would need the GPU machine's packages
        else:
            model_config(args, recipe)
    except (AssertionError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        if not has_transformer_engine() and _NAMES_TE.search(said):
            return [f"Megatron's model config was not checked to its end, which needs Transformer Engine here: {said}"]
        if isinstance(error, UserError):
            raise
        raise UserError(f"Megatron refuses the model: {said or repr(error)}") from error
    return []
