"""Bytes that connections add to a rank, by hand: rows of d values per token, and values per slot."""

from dataclasses import replace

import pytest

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs import eager_memory
from megatron_fc.connections.costs.traffic import Stream
from megatron_fc.planning import memory
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.shape import Recompute, Shape, Training

LAYOUT = Layout(
    nodes=1, gpus_per_node=4, tensor=2, pipeline=2, context=1, expert=1, expert_tensor=2, virtual_pipeline=2,
    micro_batch=3, global_batch=48, heads=4, layers=8, experts=4,
)  # fmt: skip
SHAPE = Shape(
    moe_layers=(False, True) * 4, width=64, heads=4, groups=2, head_size=16, ffn=96, vocabulary=1000, sequence=32,
    experts=4, top_k=2, expert_ffn=48,
)  # fmt: skip
TOKENS = 3 * 32 // 2  # of a tensor-parallel rank between sub-layers
ROW = TOKENS * 64 * 2
DFC, DHC = FracConfig(rate=2), HyperConfig(slots=4)


def planned(
    connection: ConnectionConfig | None, recompute: Recompute, stage: int, fused: bool = False
) -> memory.Memory:
    training = Training(recompute=recompute, norms_apart=(True,) * 3, fused_connections=fused)
    return memory.of_stage(replace(SHAPE, connection=connection), training, LAYOUT, stage)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("connection", "recompute", "rows", "betas"),
    [
        # Of a layer and its two sub-layers: o, x and n/m - 1 rows of the stream more than the residual model keeps.
        (DFC, Recompute(), 2 * 2, 2),
        (DFC, Recompute(connections=True), 2 * 1, 2),
        (DFC, Recompute("selective", ("layernorm",)), 2 * 1, 2),
        (DHC, Recompute(), 2 * 5, 2),
        (DHC, Recompute("selective", ("layernorm",)), 2 * 4, 2),
        (HyperConfig(slots=4, fractions=2), Recompute(), 2 * 3, 2),
        (ManifoldConfig(slots=4), Recompute(), 2 * 5, 2),
        (ManifoldConfig(slots=4, fractions=4), Recompute(), 2 * 2, 2),
        # Of two layers one stream, without the residual model's two per layer.
        (DHC, Recompute(stream_layers=1), 4 + 2 - 2, 2),
        (DHC, Recompute(stream_layers=2), 2 + 2 - 2, 2),
        (DHC, Recompute(stream_layers=8), 2 + 2 - 2, 2),  # a chunk has two layers
        # One stream per layer.
        (DFC, Recompute("full"), 0, 0),
        (DHC, Recompute("full"), 3, 0),
        (DHC, Recompute("full", layers=2), 3 / 2, 0),  # of two layers one
    ],
    ids=str,
)
def test_activations(connection: ConnectionConfig, recompute: Recompute, rows: float, betas: int, stage: int) -> None:
    plain = planned(None, replace(recompute, connections=False, stream_layers=0), stage)
    connected = planned(connection, recompute, stage)
    first, second = memory.in_flight(Training(), LAYOUT, stage)
    layers = 2 * (first + second)
    expected = layers * (rows * ROW + betas * 4 * connection.slots * TOKENS)
    if stage == 0 and recompute.granularity == "full" and connection.is_wide:
        expected -= 3 * ROW * first  # the first layer keeps the embedding
    if stage == 0 and recompute.freed == ("layernorm",) and connection.is_wide:
        expected += ROW * first  # its norm slot enters the stream again
    assert plain.connection_activations == 0
    assert connected.connection_activations == connected.activations - plain.activations == expected


def test_fused_kernels_keep_no_input_of_the_norm() -> None:
    first, second = memory.in_flight(Training(), LAYOUT, 0)
    per_layer = 2 * (ROW + 4 * 2 * TOKENS)
    assert planned(DFC, Recompute(), 0, fused=True).connection_activations == 2 * (first + second) * per_layer


def test_temporary() -> None:
    """Gradients of streams wait beside a sub-layer; recompute brings streams back; stages receive them."""
    layout = replace(LAYOUT, gpus_per_node=2, pipeline=1, virtual_pipeline=1)
    training = Training(norms_apart=(True,) * 3, fused_connections=False)
    shape = replace(SHAPE, vocabulary=2)  # small logits

    def temporary(connection: ConnectionConfig | None, layout: Layout = layout, stream_layers: int = 0) -> float:
        model, how = (
            replace(shape, connection=connection),
            replace(training, recompute=Recompute(stream_layers=stream_layers)),
        )
        return memory.of_stage(model, how, layout, 0).temporary

    residual = temporary(None)
    own = TOKENS * eager_memory.width_backward(Stream(64), DHC)
    assert temporary(DHC) == max(residual + 4 * ROW, own)
    assert temporary(DHC, stream_layers=3) == temporary(DHC) + (5 * 4 + 6) * ROW
    stages = replace(layout, gpus_per_node=4, pipeline=2)
    assert temporary(None, stages) == residual + ROW
    assert temporary(DHC, stages) == temporary(DHC) + 4 * ROW
    assert temporary(DHC, replace(stages, virtual_pipeline=2)) == temporary(DHC) + 8 * ROW
