"""The model of what the torch backend holds for a moment, against storages that are alive while it runs."""

import pytest
import torch

from megatron_fc import FracConfig
from megatron_fc.connections import HyperConfig, ManifoldConfig, eager
from megatron_fc.connections.costs import eager_memory
from megatron_fc.connections.costs.traffic import Stream
from megatron_fc.connections.reference import Config
from support.family import name
from support.living import living

D, TOKENS = 512, 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        FracConfig(rate=4),
        HyperConfig(slots=4),
        HyperConfig(slots=2, norm="layernorm"),
        HyperConfig(slots=4, dynamic=False),
        HyperConfig(slots=4, fractions=2),
        ManifoldConfig(slots=4),
        ManifoldConfig(slots=4, fractions=4),
    ],
    ids=name,
)
def test_backward_of_a_width_connection(config: Config, dtype: torch.dtype) -> None:
    """The rest are tables: up to 4 KiB per token, a row of d = 2048 in bf16."""
    width = config.stream_width(D)
    h, g_mixed, g_x = (torch.randn(TOKENS, size, dtype=dtype) for size in (width, width, D))
    operands, g_beta = config.build(D).operands(), torch.randn(TOKENS, config.slots)
    eager.width_backward(g_x, g_beta, g_mixed, h, operands)  # makes what is kept
    with living(peaks=True) as made:
        eager.width_backward(g_x, g_beta, g_mixed, h, operands)
    rows = TOKENS * eager_memory.width_backward(Stream(D, dtype.itemsize), config)
    tables = made.peak_bytes - h.nbytes - rows
    assert 0 <= tables < 4096 * TOKENS
    assert tables < 0.2 * rows
