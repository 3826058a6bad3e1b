"""NVIDIA's Megatron-Bridge builds its OLMoE with our layers and trains it. `make test-bridge` installs it.

It installs without its dependencies only. Its package imports every model that it has, and Transformer Engine with
them: here the files of one model are imported, and no package's list of others.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

import megatron
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.norm_over_heads import NormOverHeads
from megatron_fc.megatron.slots import NormSlot
from megatron_fc.megatron.specs import block_spec, connect, place_norms
from support import tiny
from support.layouts import OLMOE
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed

pytestmark = pytest.mark.skipif(
    not any(Path(place, "bridge").is_dir() for place in megatron.__path__),
    reason="needs Megatron-Bridge: make test-bridge",
)

# Kernels that a machine without a GPU does not have.
FUSED = ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")
FUSED += ("gradient_accumulation_fusion", "cross_entropy_loss_fusion", "moe_permute_fusion", "moe_grouped_gemm")
FUSED += ("persist_layer_norm",)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of OLMoE."""
    for name in ("bridge", "bridge.models", "bridge.models.olmoe", "bridge.utils", "bridge.training"):
        package = types.ModuleType(f"megatron.{name}")
        package.__path__ = [str(Path(place, *name.split("."))) for place in megatron.__path__]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    module = importlib.import_module("megatron.bridge.models.olmoe.olmoe_provider")
    return module.OlMoEModelProvider


@pytest.mark.parametrize("connection", [FracConfig(rate=4), HyperConfig(slots=4)], ids=lambda config: config.label)
def test_the_provider_of_olmoe_trains_with_our_layers(provider: Any, connection: ConnectionConfig) -> None:
    def spec(config: Any) -> Any:
        plain = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        return connect(block_spec(place_norms(plain, OLMOE), config), connection)

    sizes = {"num_layers": 2, "hidden_size": tiny.WIDTH, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64}
    sizes |= {"kv_channels": 16, "num_attention_heads": 4, "num_query_groups": 4, "num_moe_experts": 4}
    sizes |= {"moe_router_topk": 2, "seq_length": tiny.SEQUENCE, "vocab_size": tiny.VOCABULARY}
    made = provider(**sizes, **dict.fromkeys(FUSED, False), transformer_layer_spec=spec, use_cpu_initialization=True)
    made.finalize()
    model = made.provide(pre_process=True, post_process=True)
    assert sum(isinstance(module, NormSlot) for module in model.modules()) == 4
    assert sum(isinstance(module, NormOverHeads) for module in model.modules()) == 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = tiny.loss(model, tiny.tokens())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(
        p.grad.any() for name, p in model.named_parameters() if name.endswith(("static_beta", "q_layernorm.weight"))
    )
