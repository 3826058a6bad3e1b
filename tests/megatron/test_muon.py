"""With Muon, the parameters of connections are Adam's: orthogonalised coefficients would all have one size."""

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.emerging_optimizers import HAVE_EMERGING_OPTIMIZERS, _is_nonlinear_or_embedding
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from support import tiny

DFC, DHC, LEARNED = FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")


@pytest.mark.parametrize("kind", ["dense", "moe", "hybrid"])
@pytest.mark.parametrize("connection", [DFC, DHC, LEARNED], ids=["dfc", "dhc", "mhc"])
def test_megatrons_rules_leave_every_connection_to_adam(connection: ConnectionConfig, kind: str) -> None:
    parameters = dict(tiny.build(kind, connection).named_parameters())
    frac = {name: p for name, p in parameters.items() if is_connection_key(name)}
    assert any(p.dim() == 2 for p in frac.values()), "without the mark Muon would take it"
    for parameter in frac.values():
        assert _is_nonlinear_or_embedding(parameter)
        assert not is_managed_by_layer_wise_optimizer(parameter)
    others = [name for name, p in parameters.items() if is_managed_by_layer_wise_optimizer(p)]
    assert any("linear_qkv" in name for name in others)


@pytest.mark.skipif(not HAVE_EMERGING_OPTIMIZERS, reason="needs the package emerging-optimizers")
@pytest.mark.parametrize("precision", [{}, {"bf16": True, "params_dtype": torch.bfloat16}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("connection", [DFC, DHC, LEARNED], ids=["dfc", "dhc", "mhc"])
def test_a_step_of_muon(connection: ConnectionConfig, precision: dict[str, Any]) -> None:
    model = tiny.build("moe", connection, **precision)
    tiny.randomise_connections(model)  # at the start all streams of HC are alike, and some gradients nothing
    chunk = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    config = OptimizerConfig(optimizer="muon", lr=1e-3, weight_decay=0.0, **precision)
    optimizer = get_megatron_optimizer(config, [chunk], get_standard_config_overrides(config))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny.loss(chunk, tiny.tokens(batch=4)).backward()
    chunk.finish_grad_sync()
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    assert optimizer.step()[0]
    matrices = [name for name, p in before.items() if is_connection_key(name) and p.dim() == 2]
    assert len(matrices) == 4 + (connection == LEARNED)
    for name in matrices:
        moved = dict(model.named_parameters())[name] - before[name]
        # Adam's first step: every element by the learning rate, against its gradient's sign.
        counts = gradients[name].abs() > 1e-6
        assert counts.any()
        torch.testing.assert_close(moved[counts], -1e-3 * gradients[name][counts].sign(), rtol=0.02, atol=0)
