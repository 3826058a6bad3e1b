"""fp32 parameters of connections in a bf16 model: through training, the optimizer and a checkpoint."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import unwrap_model

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from support import tiny

BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def _trainable(connection: ConnectionConfig, seed: int) -> tuple[torch.nn.Module, MegatronOptimizer]:
    model = tiny.build("moe", connection, seed=seed, **BF16)
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    config = OptimizerConfig(optimizer="adam", lr=3e-3, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16)
    return chunk, get_megatron_optimizer(config, [chunk])


def _frac(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if is_connection_key(name)}


def _state(model: torch.nn.Module, optimizer: MegatronOptimizer, loading: bool) -> dict:
    state = {"model": unwrap_model(model).sharded_state_dict()}
    return {**state, "optimizer": optimizer.sharded_state_dict(state["model"], is_loading=loading)}


def _step(model: torch.nn.Module, optimizer: MegatronOptimizer, step: int) -> float:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = tiny.loss(model, tiny.tokens(seed=step % 4, batch=4))
    loss.backward()
    model.finish_grad_sync()
    assert optimizer.step()[0]
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connection", "steps", "learned"),
    [(FracConfig(rate=4), 100, 0.7), (HyperConfig(slots=4), 20, 0.95), (ManifoldConfig(leave="learned"), 20, 0.95)],
    ids=["dfc", "dhc", "mhc"],
)
def test_steps_save_and_load(connection: ConnectionConfig, steps: int, learned: float, tmp_path: Path) -> None:
    model, optimizer = _trainable(connection, seed=1)
    start = {name: p.detach().clone() for name, p in _frac(model).items()}
    losses = []
    for step in range(steps):
        losses.append(_step(model, optimizer, step))
    assert losses[-1] < learned * losses[0]

    trained = _frac(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained and "router" not in n} == {torch.bfloat16}
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    # What bf16 could not hold: the trained values lie between its steps.
    assert all(
        not torch.equal(p, p.bfloat16().float()) for name, p in trained.items() if "static" in name or "bias" in name
    )
    in_optimizer = {id(p): p.dtype for group in optimizer.param_groups for p in group["params"]}
    assert all(in_optimizer.get(id(p)) == torch.float32 for p in trained.values()), "not updated in place in fp32"

    with torch.no_grad():
        name = next(name for name in trained if name.endswith(("static_alpha", "mapping_bias")))
        trained[name][0] = 1.001
    dist_checkpointing.save(_state(model, optimizer, loading=False), str(tmp_path))
    stored = dist_checkpointing.load_tensors_metadata(str(tmp_path))
    dtypes = {tensor.dtype for key, tensor in stored.items() if ".connection." in key}
    assert dtypes == {torch.float32}

    other, other_optimizer = _trainable(connection, seed=2)
    loaded = dist_checkpointing.load(_state(other, other_optimizer, loading=True), str(tmp_path))
    unwrap_model(other).load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    assert _frac(other)[name][0].item() == torch.tensor(1.001).item()
    # The optimizer's moments are back at their parameters: the next step is the same.
    assert _step(model, optimizer, steps) == _step(other, other_optimizer, steps)
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(other.state_dict()[key], value), key
