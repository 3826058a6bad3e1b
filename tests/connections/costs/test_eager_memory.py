"""The model of what the torch backend holds for a moment, against storages that are alive while it runs."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fc import FracConfig
from megatron_fc.connections import HyperConfig, ManifoldConfig, eager
from megatron_fc.connections.costs import eager_memory
from megatron_fc.connections.costs.traffic import Stream
from megatron_fc.connections.reference import Config
from support.family import name

D, TOKENS = 512, 256


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made or were given, and the most of them at a time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, storage._cdata, None)


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
    with Alive(h, g_mixed, g_x) as alive:
        eager.width_backward(g_x, g_beta, g_mixed, h, operands)
    rows = TOKENS * eager_memory.width_backward(Stream(D, dtype.itemsize), config)
    tables = alive.peak - h.nbytes - rows
    assert 0 <= tables < 4096 * TOKENS
    assert tables < 0.2 * rows
