"""A half-precision model under Megatron's distributed optimizer."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.parameter_order import connection_parameters_first
from support import tiny

BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def trained(kind: str, frac: ConnectionConfig, ordered: bool) -> tuple[torch.nn.Module, Any]:
    """A bf16 model and its distributed optimizer after one step."""
    model = tiny.build(kind, frac, **BF16)
    chunk = model.module
    if ordered:
        connection_parameters_first([chunk])
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(chunk.config, ddp, model)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    tiny.loss(wrapped, tiny.tokens()).backward()
    wrapped.finish_grad_sync()
    assert optimizer.step()[0]
    return wrapped, optimizer
