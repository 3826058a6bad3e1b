"""Profiles a training loop of one's own, which says where steps begin; the report is that of `traffic run`."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from megatron.core.parallel_state import (
    get_data_parallel_world_size,
    get_expert_tensor_parallel_world_size,
    get_virtual_pipeline_model_parallel_world_size,
)
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_fc.connections.backend import backend_of
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import count_parameters
from megatron_fc.megatron.slots import NormSlot
from megatron_fc.profiling.counters.network import gather_hosts
from megatron_fc.profiling.counting import Counting
from megatron_fc.profiling.records import Report, Run
from megatron_fc.profiling.report.publish import publish
from megatron_fc.profiling.run_facts import layout, model_facts, origin
from megatron_fc.runs.writable import refuse_unwritable
from megatron_fc.training import cpu_lane


@dataclass(frozen=True)
class Batch:
    """Tokens of a sequence, and sequences of a micro-batch and of a step."""

    sequence_length: int
    micro_batch_size: int
    global_batch_size: int


class LoopProfile:
    """Counts steps of a loop; `profile_loop` makes one.

    Attributes:
        report: on rank 0 once the window is over, else None.
    """

    def __init__(self, counting: Counting, out: Path) -> None:
        self.report: Report | None = None
        self._counting, self._out = counting, out
        self._step = -1
        self._is_written = False
        self._pass = ExitStack()

    def step(self) -> None:
        """A step begins, and the one before ends; every rank calls it.

        When the last counted step ends, rank 0 writes traffic.json, traffic.md and traffic.html.
        """
        self._step += 1
        self._counting.window.begin(self._step)
        if self._counting.window.is_over and not self._is_written:
            self._is_written = True
            self.report = self._counting.gather()
            if self.report is not None:
                publish(self._out, self.report)

    def end(self) -> None:
        """The loop ends, and with it its last step.

        Raises:
            UserError: before the last counted step.
        """
        if not self._is_written:
            self.step()
        if not self._is_written:
            raise UserError(
                f"the loop ended after {self._step} steps, before those counted: set from_step or steps lower, and "
                f"call step() at the beginning of every step"
            )

    def forward_begins(self, _chunk: nn.Module, _inputs: Any) -> None:
        """A hook before the forward pass of a chunk."""
        self._watch_backward = self._pass.enter_context(self._counting.window.forward(self._step))

    def forward_ends(self, _chunk: nn.Module, _inputs: Any, output: Any) -> None:
        """A hook behind the forward pass of a chunk."""
        self._watch_backward(output)
        self._pass.close()


@contextmanager
def profile_loop(
    models: Sequence[nn.Module] | nn.Module,
    out: Path,
    *,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    from_step: int = 3,
    steps: int = 2,
) -> Iterator[LoopProfile]:
    """Count the bytes that some steps of a training loop move through device memory and the network.

    Every rank enters it once Megatron's groups and the models are there, and calls `step` where a step begins, before
    gradients are zeroed and anything is received. torch runs no compiled function in it. Results stay what they are.

    Args:
        models: this rank's chunks, or the only one, wrapped (DDP) or not.
        out: folder of the report, and of the parts that ranks leave there as they go.
        sequence_length: tokens.
        micro_batch_size: sequences.
        global_batch_size: sequences.
        from_step: first counted step, from 0. Those before fill caches and make buffers.
        steps: how many are counted.

    Raises:
        UserError: a number is out of range, `out` cannot be written, or the loop ends too soon.
    """
    batch = Batch(sequence_length, micro_batch_size, global_batch_size)
    _refuse_below(1, **vars(batch), steps=steps)
    _refuse_below(0, from_step=from_step)
    refuse_unwritable(out)
    wrapped = [models] if isinstance(models, nn.Module) else list(models)
    chunks, hosts = unwrap_model(wrapped), gather_hosts()
    counting = Counting(_run(wrapped[0], chunks, batch, from_step, steps, hosts), chunks, hosts, out)
    profile = LoopProfile(counting, out)
    with ExitStack() as contexts:
        contexts.callback(counting.stop)
        contexts.enter_context(torch._dynamo.config.patch(disable=True))
        for chunk in chunks:
            contexts.callback(chunk.register_forward_pre_hook(profile.forward_begins, prepend=True).remove)
            contexts.callback(chunk.register_forward_hook(profile.forward_ends, always_call=True).remove)
        yield profile
        profile.end()


def _refuse_below(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise UserError(f"{name}={number}: give a number from {least} on")


def _run(wrapped: Any, chunks: Sequence[Any], batch: Batch, from_step: int, steps: int, hosts: Sequence[str]) -> Run:
    args = _arguments(wrapped, chunks[0], batch)
    connection, args.transformer_impl = _layers(chunks)
    is_hybrid = getattr(args, "is_hybrid_model", False)
    return Run(
        connection="residual" if connection is None else connection.label,
        options=None if connection is None else {"kind": connection.kind, **connection.to_dict()},
        backend=None if connection is None else backend_of(connection, "cpu" if cpu_lane.needed() else "cuda")[0],
        model={"family": "hybrid" if is_hybrid else "gpt", **model_facts(args)},
        layout=layout(args, hosts),
        layers=args.num_layers // 2 if is_hybrid else args.num_layers,  # layers of a hybrid model are sub-layers
        tokens_per_step=batch.global_batch_size * batch.sequence_length,
        from_step=from_step,
        steps=steps,
        parameters=count_parameters(chunks).total,
        command=shlex.join(sys.argv),
        **origin(),
    )


def _arguments(wrapped: Any, chunk: Any, batch: Batch) -> Namespace:
    """What Megatron's own loop has as arguments, as far as models and parallel state know it."""
    config = getattr(chunk, "decoder", chunk).config  # a widened chunk's own says the stream's width
    ddp = getattr(wrapped, "ddp_config", None)
    of_ddp = ("overlap_grad_reduce", "overlap_param_gather", "num_distributed_optimizer_instances")
    return Namespace(
        **{field.name: getattr(config, field.name) for field in fields(config)}
        | {name: getattr(ddp, name, None) for name in of_ddp}
        | {
            "use_distributed_optimizer": bool(getattr(ddp, "use_distributed_optimizer", False)),
            "virtual_pipeline_model_parallel_size": get_virtual_pipeline_model_parallel_world_size(),
            "data_parallel_size": get_data_parallel_world_size(),
            "expert_tensor_parallel_size": get_expert_tensor_parallel_world_size(),
            "world_size": torch.distributed.get_world_size(),
            "padded_vocab_size": getattr(chunk, "vocab_size", None),
            "position_embedding_type": getattr(chunk, "position_embedding_type", None),
            "seq_length": batch.sequence_length,
            "micro_batch_size": batch.micro_batch_size,
            "global_batch_size": batch.global_batch_size,
        }
    )


def _layers(chunks: Sequence[Any]) -> tuple[ConnectionConfig | None, str]:
    """The connection and the implementation of the layers, of which a stage may have none."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    connection = next((module.connection.config for module in modules if isinstance(module, NormSlot)), None)
    of_te = any("transformer_engine" in cls.__module__ for module in modules for cls in type(module).__mro__)
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (connection, of_te))
    connections = [config for config, _ in found if config is not None]
    impl = "transformer_engine" if any(of_te for _, of_te in found) else "local"
    return (connections[0] if connections else None), impl
