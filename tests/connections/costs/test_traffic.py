"""The model of residual-stream bytes against counted bytes, forward and backward, within 3 %.

Counted on Megatron's own TransformerLayer, outside of its sub-layers. Norms are LayerNorms, which torch runs as one
operation on every device; an RMSNorm moves the same rows where it is fused. The fused kernels are counted in Triton's
interpreter by tests/connections/kernels/test_model.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counted_layers import count, layer, saved_bytes, unfused_hyper_layer
from megatron_fc import FracConfig, FracConnection
from megatron_fc.connections import HyperConfig, ManifoldConfig, ends, reference
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs import eager_traffic as eager
from megatron_fc.connections.costs import traffic as model
from megatron_fc.connections.costs.traffic import Moves, Stream, Traffic
from megatron_fc.planning.counts import total_device
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.phase import Whereabouts
from rank import one_rank
from support.family import name

TOKENS, WIDTH = 256, 512
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_rank():
        yield


def stream_of(dtype: torch.dtype) -> Stream:
    return Stream(WIDTH, dtype.itemsize, norm_parameters=2)


def agree(module: nn.Module, expected: Moves, dtype: torch.dtype, stream_width: int = WIDTH) -> None:
    """Bytes read and written in forward and in backward, and bytes kept, are within 3 % of the model's."""
    h = torch.randn(TOKENS, 1, stream_width, dtype=dtype)
    count(module, h.clone())  # what is made once and kept
    counts = count(module, h)
    for phase, traffic in (("forward", expected.forward), ("backward", expected.backward)):
        total = total_device(c for key, c in counts.items() if key.phase == phase)
        assert total.read_bytes == pytest.approx(traffic.read_bytes(TOKENS), rel=0.03)
        assert total.written_bytes == pytest.approx(traffic.written_bytes(TOKENS), rel=0.03)
    assert saved_bytes(module, h) == pytest.approx(TOKENS * expected.saved_bytes_per_token, rel=0.03)


@DTYPES
def test_residual(dtype: torch.dtype) -> None:
    agree(layer(None, WIDTH, dtype), model.residual(stream_of(dtype)), dtype)


@DTYPES
@pytest.mark.parametrize(
    "frac",
    [
        FracConfig(rate=4),
        FracConfig(rate=2),
        FracConfig(rate=4, dynamic=False),
        FracConfig(rate=8, norm="layernorm"),
        FracConfig(rate=2, norm="none", tanh=False, scale=False),
    ],
)
def test_torch_backend(frac: FracConfig, dtype: torch.dtype) -> None:
    connected = layer(replace(frac, backend="torch"), WIDTH, dtype)
    agree(connected, eager.torch_backend(stream_of(dtype), frac), dtype)


@DTYPES
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_hyper_connections(n: int, dynamic: bool, dtype: torch.dtype) -> None:
    config = HyperConfig(slots=n, norm="layernorm") if dynamic else HyperConfig(slots=n, dynamic=False)
    expected = eager.hyper_unfused(stream_of(dtype), config)
    agree(unfused_hyper_layer(config, WIDTH, dtype), expected, dtype, config.stream_width(WIDTH))


@DTYPES
@pytest.mark.parametrize(
    "config",
    [
        HyperConfig(slots=4),
        HyperConfig(slots=2, norm="layernorm"),
        HyperConfig(slots=4, dynamic=False),
        HyperConfig(slots=4, fractions=2),
        HyperConfig(slots=4, dynamic_alpha=False),
        FracConfig(rate=4, dynamic_beta=False, norm_affine=False),
        ManifoldConfig(slots=4),
        ManifoldConfig(slots=2),
        ManifoldConfig(slots=4, fractions=4),
    ],
    ids=name,
)
def test_torch_backend_of_other_kinds(config: ConnectionConfig, dtype: torch.dtype) -> None:
    expected = eager.torch_backend(stream_of(dtype), config)
    agree(layer(config, WIDTH, dtype), expected, dtype, config.stream_width(WIDTH))


class Reference(nn.Module):
    """A layer whose connections are `megatron_fc.connections.reference` under autograd."""

    def __init__(self, plain: nn.Module, frac: FracConfig) -> None:
        super().__init__()
        self.layer = plain
        self.sites = nn.ModuleList(FracConnection(WIDTH, frac) for _ in range(2))

    def forward(self, h: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
        inner = self.layer
        steps = (
            (inner.input_layernorm, partial(inner.self_attention, attention_mask=attention_mask)),
            (inner.pre_mlp_layernorm, inner.mlp),
        )
        for site, (norm, sub_layer) in zip(self.sites, steps, strict=True):
            p = site.site_parameters()
            o, _ = sub_layer(norm(reference.width(h, p, site.config)))
            h = reference.depth(o, h, p, site.config)
        return h, None


@DTYPES
@pytest.mark.parametrize("frac", [FracConfig(norm="layernorm"), FracConfig(rate=2, dynamic=False)])
def test_readable_reference(frac: FracConfig, dtype: torch.dtype) -> None:
    agree(Reference(layer(None, WIDTH, dtype), frac), eager.frac_reference(stream_of(dtype), frac), dtype)


ROWS: list[tuple[Callable[..., Moves], tuple[Any, ...], int, int]] = [
    (model.residual, (), 10, 12),
    (model.fused_residual, (), 10, 8),
    (model.layer_alone, (FracConfig(),), 9, 13),
    (model.layer_across, (FracConfig(),), 8, 12),
    (model.layer_in_two_operations, (FracConfig(),), 10, 14),
    (model.layer_pure, (FracConfig(),), 12, 24),
    (model.layer_alone, (HyperConfig(slots=4),), 24, 34),
    (model.layer_across, (HyperConfig(slots=4),), 20, 30),
    (model.layer_across, (HyperConfig(slots=4, fractions=2),), 12, 18),
    (model.layer_across, (ManifoldConfig(slots=4),), 20, 30),
    (model.layer_across, (ManifoldConfig(slots=4, fractions=4),), 8, 12),
    (model.layer_in_two_operations, (HyperConfig(slots=4),), 28, 38),
    (model.layer_pure, (HyperConfig(slots=4),), 36, 78),
    (model.hyper_ideal, (HyperConfig(slots=1),), 8, 12),
    (model.hyper_ideal, (HyperConfig(slots=4),), 20, 30),
    (eager.hyper_unfused, (HyperConfig(slots=4),), 80, 178),
]


@pytest.mark.parametrize(("scheme", "arguments", "forward", "backward"), ROWS)
def test_rows_that_the_documents_name(
    scheme: Callable[..., Moves], arguments: tuple[Any, ...], forward: int, backward: int
) -> None:
    stream = Stream(2**16)  # so wide that terms vanish
    moves = scheme(stream, *arguments)
    for traffic, rows in ((moves.forward, forward), (moves.backward, backward)):
        per_token = traffic.read_bytes_per_token + traffic.written_bytes_per_token
        assert per_token / stream.row == pytest.approx(rows, rel=2e-3)


class Entering(nn.Module):
    """A network of its beginning alone."""

    def __init__(self, config: ConnectionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, h: Tensor) -> Tensor:
        return ends.enter(h, self.config)


def test_the_embedding_enters_every_slot() -> None:
    """Read once, written r times, and the reverse for gradients: as counted."""
    stream, config = Stream(8, element_bytes=4), HyperConfig(slots=4)
    assert model.enter(stream, FracConfig(rate=4)) == Moves(Traffic(), Traffic())
    embedding, gradient = torch.randn(5, 8, requires_grad=True), torch.randn(5, 32)
    network = Entering(config)
    with Whereabouts(network) as whereabouts, DeviceCounter(whereabouts) as counter:
        network(embedding).backward(gradient)
    moves = model.enter(stream, config)
    for phase, moved in (("forward", moves.forward), ("backward", moves.backward)):
        counted = total_device(count for key, count in counter.counts.items() if key.phase == phase)
        assert counted.read_bytes == 5 * moved.read_bytes_per_token
        assert counted.written_bytes == 5 * moved.written_bytes_per_token


def test_a_step_adds_up() -> None:
    traffic = Traffic(3, 2, 10, 20)
    moves = Moves(traffic, traffic * 2)
    assert traffic.total_bytes(tokens=7) == 7 * 5 + 30
    assert moves.step_bytes(tokens=7) == 3 * 65
    assert moves.step_bytes(tokens=7, micro_batches=2, layers=5, recompute=True) == 10 * 4 * 65


@pytest.mark.parametrize(
    ("operation", "forward", "backward"),
    [(model.width_norm, 5, 13), (model.depth, 9, 6), (model.boundary, 10, 15)],
)
def test_rows_of_four_streams(operation: Callable[..., Moves], forward: int, backward: int) -> None:
    """And of one, 2 + 4, 3 + 3 and 4 + 6, which FC has: with r streams r + 1 and 3r + 1, and so on."""
    stream = Stream(2**16)
    moves = operation(stream, HyperConfig(slots=4))
    for traffic, rows in ((moves.forward, forward), (moves.backward, backward)):
        per_token = traffic.read_bytes_per_token + traffic.written_bytes_per_token
        assert per_token / stream.row == pytest.approx(rows, rel=2e-3)
