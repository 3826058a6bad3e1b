"""Megatron's fine-grained activation offload: its own manager, which takes CPU tensors for the GPU's.

Two things stand in for a GPU: Transformer Engine's module, of which Megatron only sets a flag, and the check that a
tensor is a CUDA tensor. Streams do nothing here; whether copies and computation are ordered a card must show.
"""

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface as Offloading,
)

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from support import tiny

DFC = FracConfig(rate=4)


@pytest.fixture(autouse=True)
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(transformer_engine, "cpu_offload", types.SimpleNamespace())
    monkeypatch.setattr(
        ChunkOffloadHandler,
        "_can_manage_tensor_for_offload",
        staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter)),
    )
    Offloading.reset_instance()
    yield
    Offloading.reset_instance()


def steps(frac: ConnectionConfig | None, *modules: str, hand_over: bool = True) -> list[dict[str, torch.Tensor]]:
    """Gradients of two steps: the manager only takes notes in the first one."""
    options: dict[str, Any] = {}
    if modules:
        options = {"fine_grained_activation_offloading": True, "offload_modules": list(modules)}
        options["min_offloaded_tensor_size"] = 1
    model = (tiny.build if hand_over else tiny.build_without_hand_over)("mixed", frac, **options)
    tiny.randomise_connections(model)
    result = []
    for seed in (0, 1):
        model.zero_grad()
        tiny.loss(model, tiny.tokens(seed)).backward()
        if modules:
            Offloading.reset()
        result.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return result


@pytest.mark.parametrize(
    "frac",
    [
        DFC,
        FracConfig(rate=4, recompute=True),
        FracConfig(rate=4, dynamic=False),
        HyperConfig(slots=4, stream_layers=2),
        ManifoldConfig(slots=4),
    ],
)
def test_gradients_are_those_without(frac: ConnectionConfig) -> None:
    plain, offloaded = steps(frac), steps(frac, "core_attn", "attn_proj", "qkv_linear")
    for before, after in zip(plain, offloaded, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("module", ["attn_norm", "mlp_norm"])
def test_why_the_norms_are_refused(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron frees the residual with the norm's group; its own sum does not need it again.

    Nor does a depth connection that takes over from the width connection; one that looks at h by itself does.
    """
    steps(None, module)
    monkeypatch.setattr("megatron_fc.megatron.slots.refuse_unsupported_config", lambda *_: None)
    plain, offloaded = steps(DFC), steps(DFC, module)
    for before, after in zip(plain, offloaded, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RuntimeError, match="storage of size 0"):
        steps(DFC, module, hand_over=False)
