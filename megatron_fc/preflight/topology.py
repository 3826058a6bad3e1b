"""The topology of a config on a number of nodes: layout, batch, steps, GPU-hours; needs no GPU."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.planning.layout import Layout
from megatron_fc.preflight.batch_schedule import batch_sizes
from megatron_fc.preflight.disk_space import disk_space_of
from megatron_fc.preflight.nodes import DiskSpace
from megatron_fc.preflight.packages import lacking_packages
from megatron_fc.preflight.validation import validate
from megatron_fc.training.data_files import refuse_damaged_files, refuse_missing_files, repetition
from megatron_fc.training.warm_up import never_at_the_peak


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
            f"assuming {self.mfu:.0%} of {self.peak_tflops:,.0f} TFLOP/s per GPU in any layout: `megatron-fc plan` "
            f"estimates this one, or give --tokens-per-second-per-gpu"
        )


@dataclass(frozen=True)
class Topology:
    """A run on its nodes.

    Attributes:
        layout: sizes of all kinds of parallelism.
        sequence: tokens per sequence.
        batches: sample from which a batch size holds, and the batch, in order; `layout` has the last one.
        steps: optimizer steps of the whole run.
        tokens: that are trained in all.
        target_tokens: that the config asks for; Megatron leaves out what does not fill a last batch.
        flops_per_token: forward and backward, by Megatron's count; None without vocab_size.
        throughput: basis of the GPU-hours.
        unchecked: what this machine could not check, in words.
        repetition: how often the data are read, in words; None without a look at them, or where once is enough.
        warm_up: a warning of a learning rate that never reaches its peak.
        disk_space: that checkpoints need; None if the run saves none.
        lacking: packages that this Python, which will start the run, does not have, in words; None if it has all, or
            another one starts it.
    """

    layout: Layout
    sequence: int
    batches: list[tuple[int, int]]
    steps: int
    tokens: int
    target_tokens: int
    flops_per_token: float | None
    throughput: Throughput
    unchecked: list[str]
    repetition: str | None
    warm_up: str | None
    disk_space: DiskSpace | None
    lacking: str | None

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch * self.sequence

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
            "layers_of_stages": layout.layers_of_stages,
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
            "repetition": self.repetition,
            "warm_up": self.warm_up,
            "checkpoint_bytes": self.disk_space and self.disk_space.checkpoint_bytes,
            "checkpoints": sum(self.disk_space.kept) if self.disk_space else 0,
            "lacking": self.lacking,
        }

    def lines(self) -> list[str]:
        """Return the same for people."""
        layout = self.layout
        stages = f" VPP{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
        lines = [
            f"ranks      {layout.world} = nodes {layout.nodes} x GPUs {layout.gpus_per_node}",
            f"layout     DP{layout.data} TP{layout.tensor} PP{layout.pipeline}{stages} CP{layout.context}",
        ]
        if len(set(layout.layers_of_stages)) > 1:
            lines.append(f"stages     {' '.join(map(str, layout.layers_of_stages))} layers")
        if layout.experts:
            lines.append(f"experts    EP{layout.expert} ETP{layout.expert_tensor}, expert-DP{layout.expert_data}")
        lines += [
            f"batch      {layout.global_batch:,} sequences = micro-batch {layout.micro_batch} x DP{layout.data} x "
            f"{layout.accumulation_steps} accumulation steps",
            f"step       {self.tokens_per_step:,} tokens, {self.sequence:,} per sequence",
            f"run        {self.steps:,} steps, {self.tokens:,} tokens",
        ]
        if len(self.batches) > 1:
            sizes = ", ".join(f"{batch:,} sequences from sample {first:,}" for first, batch in self.batches)
            lines.insert(-1, f"schedule   batches of {sizes} on; shown is a step of the last")
        if self.tokens != self.target_tokens:
            lines[-1] += f" (the target is {self.target_tokens:,}: whole batches only)"
        warned = self.repetition is not None and self.repetition.startswith("WARNING: ")
        if self.repetition and not warned:
            lines.append(f"data       {self.repetition}")
        if self.flops_per_token is None:
            lines.append("compute    not known without vocab_size in the config")
        else:
            lines.append(
                f"compute    {self.flops_per_token:.3e} FLOPs per token, forward and backward, by Megatron's count, "
                f"which leaves out the connections"
            )
        if self.gpu_hours is not None:
            days = self.gpu_hours / layout.world / 24
            lines.append(f"GPU-hours  {self.gpu_hours:,.0f} in all, {days:,.1f} days, {self.throughput}")
        if self.disk_space and (whole := self.disk_space.of_the_whole_run()):
            lines.append(f"disk       checkpoints of the whole run: {whole}")
        lines += [f"note: {note}" for note in self.unchecked]
        lines += [f"WARNING: {self.lacking}"] * bool(self.lacking)
        lines += [self.warm_up] if self.warm_up else []
        return [*lines, self.repetition] if self.repetition and warned else lines


def topology(
    config: Path,
    overrides: Sequence[str],
    nodes: int,
    gpus_per_node: int,
    throughput: Throughput,
    *,
    check_files: bool = False,
    check_packages: bool = False,
) -> Topology:
    """Check a config for a number of nodes and work out what it comes to; needs no GPU.

    Args:
        config, overrides, nodes, gpus_per_node: as in `validate`.
        throughput: basis of the GPU-hours.
        check_files: data and tokenizer are to be here, as on a login node. Whether the disk has room is for the caller
            to ask, `Topology.disk_space`.
        check_packages: this Python is the one that will start the run.

    Raises:
        UserError: as `validate`, or a file is missing.
    """
    run = validate(config, overrides, nodes, gpus_per_node)
    if check_files:
        refuse_missing_files(run.args)
        refuse_damaged_files(run.args)
    return Topology(
        layout=run.layout,
        sequence=run.args.seq_length,
        batches=batch_sizes(run.args),
        steps=run.steps,
        tokens=run.tokens,
        target_tokens=run.target_tokens,
        flops_per_token=_flops_per_token(run.args),
        throughput=throughput,
        unchecked=run.unchecked,
        repetition=repetition(run.args) if check_files else None,
        warm_up=never_at_the_peak(run.args),
        disk_space=disk_space_of(run.recipe, run.args),
        lacking=lacking_packages(run.recipe, run.args) if check_packages else None,
    )


def _flops_per_token(args: Namespace) -> float | None:
    from megatron.training.training import num_floating_point_operations

    if args.padded_vocab_size is None:
        return None
    return float(num_floating_point_operations(args, 1)) / args.seq_length
