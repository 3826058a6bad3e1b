"""Recompute, CUDA graphs, offload, Megatron-FSDP and EP overlap on a card, in Megatron's own training loop.

Each feature trains the tiny model of `tests/training/test_loop.py` and must give the losses of the run without it.
None of these has been run yet: docs/memory.md says what is known from reading Megatron's code.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from support.launched import losses

# The fixture; pytest finds it by its name here.
from support.training_runs import config as config

pytestmark = pytest.mark.gpu

# A learning rate at which the connections leave the identity within a few iterations.
BASE = ("bf16=true", "lr=1.0e-2", "lr_warmup_iters=0", "train_iters=12", "use_distributed_optimizer=true")
BASE = (*BASE, "save_interval=null", "eval_iters=0")
DENSE = ("num_experts=null", "moe_ffn_hidden_size=null", "moe_router_topk=null")
# Graphs and kernels round in another order than eager torch, in bf16.
CLOSE = {"rtol": 5e-3, "atol": 5e-3}


@dataclass(frozen=True)
class Feature:
    """Overrides of the config that switch a feature on, and what it needs."""

    overrides: tuple[str, ...]
    model: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


TE = ("transformer_engine",)
FEATURES = {
    "frac_recompute": Feature(("connections.recompute=true",)),
    "full recompute": Feature(("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")),
    "layernorm recompute": Feature(("recompute_granularity=selective", "recompute_modules=[layernorm]")),
    "moe_act recompute": Feature(
        ("recompute_granularity=selective", "recompute_modules=[moe_act]"), model=("moe_grouped_gemm=true",), needs=TE
    ),
    "local graphs of whole layers": Feature(("cuda_graph_impl=local",), model=DENSE),
    "local graphs, frac_recompute": Feature(("cuda_graph_impl=local", "connections.recompute=true"), model=DENSE),
    "local graphs of the router": Feature(("cuda_graph_impl=local", "cuda_graph_modules=[moe_router]")),
    "TE graphs of attention and router": Feature(
        ("cuda_graph_impl=transformer_engine", "cuda_graph_modules=[attn,moe_router]"), needs=TE
    ),
    "graph of the full iteration": Feature(
        ("cuda_graph_impl=full_iteration", "no_check_for_nan_in_loss_and_grad=true"), model=DENSE, needs=TE
    ),
    "offload": Feature(
        ("fine_grained_activation_offloading=true", "offload_modules=[core_attn,attn_proj,qkv_linear]"),
        needs=TE,
        environment={"NVTE_CPU_OFFLOAD_V1": "1"},  # Megatron asks for it from Transformer Engine 2.10 on
    ),
    "Megatron-FSDP": Feature(
        ("use_megatron_fsdp=true", "data_parallel_sharding_strategy=optim_grads_params", "ckpt_format=fsdp_dtensor"),
        model=("no_gradient_accumulation_fusion=true",),
        ranks=2,
        environment={"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
    ),
    "Megatron-FSDP from the meta device": Feature(
        (
            *("use_megatron_fsdp=true", "data_parallel_sharding_strategy=optim_grads_params"),
            *("ckpt_format=fsdp_dtensor", "init_model_with_meta_device=true", "connections.recompute=true"),
        ),
        model=("no_gradient_accumulation_fusion=true",),
        ranks=2,
        environment={"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
    ),
    "EP overlap": Feature(
        ("overlap_moe_expert_parallel_comm=true",),
        model=("expert_model_parallel_size=2",),
        ranks=2,
        environment={"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    ),
}


def run(config: Path, run_dir: Path, feature: Feature, overrides: tuple[str, ...]) -> torch.Tensor:
    chosen = (*BASE, *feature.model, *overrides)
    return losses(config, run_dir, feature.ranks, *chosen, variables=feature.environment)


@pytest.mark.parametrize("connection", ["dfc", "sfc"])
@pytest.mark.parametrize("name", FEATURES)
def test_losses_are_those_without(name: str, connection: str, config: Path, tmp_path: Path) -> None:
    feature = FEATURES[name]
    for module in feature.needs:
        pytest.importorskip(module)
    if torch.cuda.device_count() < feature.ranks:
        pytest.skip(f"needs {feature.ranks} CUDA devices")
    chosen = (f"connection={connection}",)
    plain = run(config, tmp_path / "plain", feature, chosen)
    with_feature = run(config, tmp_path / "feature", feature, (*chosen, *feature.overrides))
    assert len(plain) == 12
    torch.testing.assert_close(with_feature, plain, **CLOSE)
    residual = run(config, tmp_path / "residual", feature, ("connection=residual",))
    assert (residual - plain).abs().max() > 2 * CLOSE["atol"], "the connections have not moved: nothing was compared"
