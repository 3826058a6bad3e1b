"""Layers of Megatron's with each kind of connection, and the bytes that they move outside of attention and MLP."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fc.connections import HyperConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.specs import block_spec, connect
from megatron_fc.planning.counts import DeviceCounts
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.phase import Whereabouts
from unfused_hyper import UnfusedHyper

_SUB_LAYERS = {"self_attention", "mlp"}


class ConnectedLayer(nn.Module):
    """The norms, attention and MLP of a layer of Megatron's between two sites of any kind."""

    def __init__(self, layer: nn.Module, sites: list[Any]) -> None:
        super().__init__()
        self.layer = layer
        self.sites = nn.ModuleList(sites)

    def forward(self, h: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
        layer, (before_attention, before_mlp) = self.layer, self.sites
        x, handover = before_attention(h, norm=layer.input_layernorm, hand_over=True)
        o, _ = layer.self_attention(x, attention_mask)
        h = before_attention.depth(o, h, handover)
        x, handover = before_mlp(h, norm=layer.pre_mlp_layernorm, hand_over=True)
        o, _ = layer.mlp(x)
        return before_mlp.depth(o, h, handover), None


def layer(connection: ConnectionConfig | None, width: int, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A layer of Megatron's with small sub-layers, LayerNorm (one operation in torch on any device), no dropout.

    It takes and returns the stream of its connections.
    """
    config = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        kv_channels=64,
        ffn_hidden_size=64,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        attention_backend=AttnBackend.unfused,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **options,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    spec: Any = get_gpt_layer_local_spec()
    if connection is not None:
        [spec] = connect(block_spec(spec, config), connection).layer_specs or []
    return build_module(spec, config=config, layer_number=1).to(dtype)


def unfused_hyper_layer(config: HyperConfig, width: int, dtype: torch.dtype) -> nn.Module:
    """`layer` with Hyper-Connections as the paper lists them; parameters and streams in one dtype."""
    sites = [UnfusedHyper(width, config, sub_layer) for sub_layer in range(2)]
    return ConnectedLayer(layer(None, width, dtype), sites).to(dtype)


def count(model: nn.Module, stream: Tensor) -> DeviceCounts:
    """Bytes of one forward and backward pass outside of the sub-layers; the stream is [tokens, 1, ...]."""
    tokens = len(stream)
    mask = torch.ones(1, 1, tokens, tokens).triu(1).bool()
    incoming = torch.randn_like(stream)
    with Whereabouts(model) as whereabouts, DeviceCounter(whereabouts) as counter:
        out, _ = model(stream.requires_grad_(), attention_mask=mask)
        out.backward(incoming)
    model.zero_grad()
    return {key: c for key, c in counter.counts.items() if _outside(key.module)}


def saved_bytes(model: nn.Module, stream: Tensor) -> int:
    """Bytes that autograd keeps for backward outside of the sub-layers: every storage once, parameters left out."""
    tokens = len(stream)
    mask = torch.ones(1, 1, tokens, tokens).triu(1).bool()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if _outside(whereabouts.now().module):
            saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Whereabouts(model) as whereabouts, hooks:
        model(stream.requires_grad_(), attention_mask=mask)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in saved)}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def _outside(module: str) -> bool:
    return _SUB_LAYERS.isdisjoint(module.split("."))
