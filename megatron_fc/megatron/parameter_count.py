"""The number of parameters of a distributed model, each counted once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core import mpu
from torch import nn

from megatron_fc.connections.kinds import is_connection_key


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, and those among them that connections added."""

    total: int
    connections: int


def count_parameters(chunks: Iterable[nn.Module]) -> ParameterCount:
    """Count over all ranks; every rank calls it.

    Args:
        chunks: this rank's model chunks.
    """
    total = connections = 0.0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            share = parameter.numel() / _copies(parameter)
            if getattr(parameter, "shared_embedding", False) and not mpu.is_pipeline_first_stage():
                continue
            total += share
            connections += share if is_connection_key(name) else 0
    counts = torch.tensor([total, connections], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts)
    return ParameterCount(*(round(value) for value in counts.tolist()))


def _copies(parameter: nn.Parameter) -> int:
    """Ranks that hold the same values."""
    split = getattr(parameter, "tensor_model_parallel", False)
    if not getattr(parameter, "allreduce", True):
        copies = mpu.get_expert_data_parallel_world_size()
        return copies if split else copies * mpu.get_expert_tensor_parallel_world_size()
    copies = mpu.get_data_parallel_world_size(with_context_parallel=True)
    return copies if split else copies * mpu.get_tensor_model_parallel_world_size()
