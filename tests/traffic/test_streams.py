"""The model of residual-stream bytes against counted bytes, forward and backward, within 3 %.

Counted on Megatron's own TransformerLayer, outside of its sub-layers. Norms are LayerNorms, which torch runs as one
operation on every device; an RMSNorm moves the same rows there where it is fused.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc import FracConfig, FracConnection, functional
from megatron_fc.traffic import streams as model
from megatron_fc.traffic import streams_eager as eager
from megatron_fc.traffic.counts import DeviceCounts, total_device
from megatron_fc.traffic.device_counter import DeviceCounter
from megatron_fc.traffic.hyper_connection import HyperConnection
from megatron_fc.traffic.phase import Whereabouts
from megatron_fc.traffic.streams import Moves, Stream

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.megatron import cpu

    cpu.install()
    import tiny

TOKENS, WIDTH = 256, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with tiny.one_rank():
        yield


def between_sub_layers(counts: DeviceCounts, phase: str) -> tuple[int, int]:
    """Bytes read and written outside of attention and MLP."""
    total = total_device(
        count
        for key, count in counts.items()
        if key.phase == phase and not key.module.startswith(("self_attention", "mlp"))
    )
    return total.read_bytes, total.written_bytes


def counted_layer(frac: FracConfig | None, dtype: torch.dtype, **options: Any) -> dict[str, tuple[int, int]]:
    """Bytes read and written by phase, of a layer of Megatron's."""
    options |= {"normalization": "LayerNorm", "hidden_size": WIDTH, "params_dtype": dtype}
    layer = tiny.build("dense", frac, **options).decoder.layers[0].to(dtype)
    h = torch.randn(TOKENS, 1, WIDTH, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, TOKENS, TOKENS).triu(1).bool()
    incoming = torch.randn_like(h)
    with Whereabouts(layer) as whereabouts, DeviceCounter(whereabouts) as counter:
        out, _ = layer(h, attention_mask=mask)
        out.backward(incoming)
    return {phase: between_sub_layers(counter.counts, phase) for phase in ("forward", "recompute", "backward")}
