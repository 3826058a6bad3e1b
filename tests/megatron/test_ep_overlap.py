"""Megatron's schedule plan for overlapping the experts' all-to-all, which calls a layer's parts one by one.

One rank: Megatron's `overlap_moe_expert_parallel_comm` itself wants expert ranks and bf16, the plan does not.
"""

from typing import Any

import pytest
import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan as Plan
from megatron.core.pipeline_parallel import utils as pipeline_utils
from megatron.core.tensor_parallel import mappings, random

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from support import tiny

CONNECTIONS = [None, FracConfig(rate=4), FracConfig(rate=4, dynamic=False), FracConfig(rate=4, recompute=True)]
CONNECTIONS += [HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")]
NAMES = ["residual", "dfc", "sfc", "dfc-recompute", "dhc", "mhc"]


@pytest.fixture(autouse=True)
def fresh_memory_from_every_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between ranks an all-to-all writes new memory, and the plan frees what went in; on one rank it returns that."""
    forward = mappings._AllToAll.forward

    def new_memory(ctx: Any, group: Any, tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        return forward(ctx, group, tensor, *rest).clone()

    monkeypatch.setattr(mappings._AllToAll, "forward", staticmethod(new_memory))
    pipeline_utils.set_streams()


def build(frac: ConnectionConfig | None, **options: Any) -> torch.nn.Module:
    model = tiny.build("mixed", frac, **{"num_layers": 3, "moe_layer_freq": [0, 1, 1], **options})
    tiny.randomise_connections(model)
    return model


def plan(model: torch.nn.Module, seed: int) -> Any:
    t = tiny.tokens(seed)
    return model.build_schedule_plan(*tiny.inputs(t), labels=t[:, 1:])


def overlapped(model: torch.nn.Module) -> list[torch.Tensor]:
    """Two micro-batches, the second's forward pass layer by layer between the first's backward pass."""
    first = plan(model, 0)
    losses = [Plan.run(first, None)]
    gradient = torch.full_like(losses[0], 1 / losses[0].numel())
    second = plan(model, 1)
    losses.append(Plan.run(second, first, b_grad=gradient))
    Plan.run(None, second, b_grad=gradient)
    return [loss.detach().mean() for loss in losses]


def one_after_the_other(model: torch.nn.Module) -> list[torch.Tensor]:
    losses = []
    for seed in (0, 1):
        losses.append(tiny.loss(model, tiny.tokens(seed)))
        losses[-1].backward()
    return [loss.detach() for loss in losses]


OPTIONS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "shared": {"moe_shared_expert_intermediate_size": 64},
    "mtp": {"mtp_num_layers": 1, "moe_layer_freq": 1},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("frac", CONNECTIONS, ids=NAMES)
def test_losses_and_gradients_are_those_of_the_plain_schedule(frac: ConnectionConfig | None, options: str) -> None:
    if options == "layernorm":
        try:
            random._get_share_storage()
        except Exception as error:
            pytest.skip(f"selective layernorm recompute compiles a C++ extension: {error}")
    model, reference = (build(frac, **(OPTIONS[options])) for _ in range(2))
    assert [loss.item() for loss in overlapped(model)] == [loss.item() for loss in one_after_the_other(reference)]
    # Parts of a gradient are added in another order; those of the embedding come from every stream.
    rounding = {"rtol": 1e-5, "atol": 1e-6 if frac is not None and frac.is_wide else 1e-7}
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, **rounding, msg=lambda m, n=name: f"{n}: {m}")
