"""FLOPs, bytes and seconds of a step, by hand on shapes small enough for it."""

from dataclasses import replace
from math import isclose

import pytest

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs.eager_traffic import torch_backend
from megatron_fc.connections.costs.traffic import Stream, norm
from megatron_fc.planning import flops, operations, work
from megatron_fc.planning.calibration import Assumptions
from megatron_fc.planning.devices import DEVICES
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.overlap import Computed, Network, beside_computation
from megatron_fc.planning.parameters import model
from megatron_fc.planning.products import Operation
from megatron_fc.planning.roofline import StepTime, step_time
from megatron_fc.planning.shape import Kind, Recompute, Shape, Training
from megatron_fc.planning.stages import Split, parsed

# 16 tokens of width 8, half as many keys as queries; 4 experts of 6, 2 of them for a token.
SMALL = Shape((False, True), 8, 2, 1, 4, 12, 32, 16, experts=4, top_k=2, expert_ffn=6)
ONE = Layout(nodes=1, gpus_per_node=1, micro_batch=1, global_batch=1, heads=2, layers=2, experts=4)


def moved(listed: list[Operation]) -> dict[str, list[tuple[float, float]]]:
    """Bytes of the forward and backward passes, by operation."""
    found: dict[str, list[tuple[float, float]]] = {}
    for operation in listed:
        found.setdefault(operation.name, []).append((operation.forward.bytes, operation.backward.bytes))
    return found


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("flash", [False, True])
def test_operations_do_the_models_flops(moe: bool, tensor: int, flash: bool) -> None:
    shape = replace(SMALL, shared_ffn=4 * moe)
    layout = replace(ONE, gpus_per_node=tensor, tensor=tensor, expert_tensor=1)
    once = flops.layer(shape, Kind(moe))
    listed = operations.layer(shape, Training(flash=flash), layout, Kind(moe))
    forward = 16 * (once.attention + once.scores + once.mlp) / tensor
    assert sum(operation.forward.flops for operation in listed) == forward
    # Flash attention multiplies queries and keys once more: half of the scores' two products.
    again = 16 * once.scores / 2 / tensor if flash else 0
    assert sum(operation.backward.flops for operation in listed) == 2 * forward + again
    last = operations.head(shape, Training(), layout)
    assert sum(operation.forward.flops for operation in last) == 16 * flops.forward(shape).head / tensor
    assert sum(operation.backward.flops for operation in last) == 16 * flops.backward(shape).head / tensor


def test_bytes_of_attention() -> None:
    bytes_of = moved(operations.layer(SMALL, Training(), ONE, Kind(False)))
    # 16 rows of 8, a weight of 8 x 16, 16 rows of 16; then 16 rows of 8, a weight of 8 x 8, 16 rows of 8; all of 2
    # bytes. Backward: gradient twice, input, weight, the input's gradient; the weight's is read and written in 4 bytes.
    first = 2 * (128 + 128 + 256), 2 * (2 * 128 + 128 + 2 * 256) + 2 * 4 * 128
    last = 2 * (128 + 64 + 128), 2 * (2 * 128 + 64 + 2 * 128) + 2 * 4 * 64
    assert bytes_of["attention's projections"] == [first, last]
    # 8 + 4 numbers of queries and keys, read and written; half as much again in backward.
    assert bytes_of["rotation, norms of queries and keys"] == [(768, 1152)]
    # Queries, keys, values, output: 8 + 4 + 4 + 8 numbers of a token.
    assert bytes_of["attention"] == [(16 * 24 * 2, 2 * 16 * 24 * 2)]
    unfused = moved(operations.layer(SMALL, Training(flash=False), ONE, Kind(False)))
    scores = 16 * 16 * 2  # of two heads, written and read in 2 and in 4 bytes
    assert unfused["attention"] == [(768 + scores * 12, 2 * (768 + scores * 12))]


def test_bytes_of_experts() -> None:
    bytes_of = moved(operations.layer(SMALL, Training(), ONE, Kind(True)))
    # Norm's output of 16 rows of 8, and 8 fp32 numbers of each of 4 experts.
    assert bytes_of["routing"] == [(16 * (2 * 8 + 8 * 4 * 4),) * 2]
    # 32 rows of 8, weights of 4 x 8 x 12 and 4 x 6 x 8.
    first = 2 * (256 + 384 + 384), 2 * (2 * 256 + 384 + 2 * 384) + 2 * 4 * 384
    last = 2 * (192 + 192 + 256), 2 * (2 * 192 + 192 + 2 * 256) + 2 * 4 * 192
    assert bytes_of["experts"] == [first, last]
    assert bytes_of["order of the experts' rows"] == [(4 * 2 * 256 * 2, 4 * 2 * 256 * 2)]
    assert bytes_of["activation of experts"] == [(2 * 32 * (12 + 6), 2 * 32 * (12 + 12 + 6))]
    divided = replace(ONE, gpus_per_node=2, expert=2)  # as many rows on half of the experts
    assert moved(operations.layer(SMALL, Training(), divided, Kind(True)))["experts"][0][0] == 2 * (256 + 192 + 384)


def test_products_compute_whole_tiles() -> None:
    """Of 300 rows by 300 x 600, 512 by 512 x 768; the weights' gradient has 600 x 300 for a result."""
    shape = replace(SMALL, width=300, ffn=300, sequence=300)
    first = next(one for one in operations.layer(shape, Training(), ONE, Kind(False)) if one.name == "MLP")
    rows, inner, outer = 512 / 300, 512 / 300, 768 / 600
    assert first.forward.wasted == pytest.approx(first.forward.flops * (rows * outer - 1))
    assert first.backward.wasted == pytest.approx(first.forward.flops * (rows * inner + inner * outer - 2))
    even = replace(shape, width=512, ffn=256, sequence=1024)
    assert all(
        one.forward.wasted == 0 for one in operations.layer(even, Training(), ONE, Kind(False)) if "MLP" in one.name
    )
    windowed = replace(even, window=128, windowed=(True, True))
    full, narrow = (
        next(one for one in operations.layer(windowed, Training(), ONE, Kind(False, near)) if one.name == "attention")
        for near in (False, True)
    )
    assert full.forward.wasted / full.forward.flops == pytest.approx(64 / 512)
    assert narrow.forward.wasted / narrow.forward.flops == pytest.approx(128 / (128 - 128 * 128 / 2048))


def test_bytes_of_narrow_products() -> None:
    """FP8: 16 rows of 8 by 8 x 16. Operands are a byte and 1/32 of a scale; what comes in is read and written twice."""
    fp8, one = Training(products="fp8"), 1 + 1 / 32
    forward = one * (128 + 128) + 2 * 256 + (2 + 2 * one) * 128
    backward = one * (128 + 128 + 2 * 256) + 2 * 128 + 2 * 4 * 128 + (2 + 2 * one) * 256
    listed = operations.layer(SMALL, fp8, ONE, Kind(False))
    assert moved(listed)["attention's projections"][0] == (forward, backward)
    # One scale of a tensor reads it before; Hopper transposes what is written: read once, written once.
    whole = operations.layer(SMALL, replace(fp8, tensor_scales=True, transposes=True), ONE, Kind(False))
    assert moved(whole)["attention's projections"][0] == (forward + 128 * (2 + one), backward + 256 * (2 + one))
    four, half = operations.layer(SMALL, Training(products="fp4"), ONE, Kind(False)), 1 / 2 + 1 / 16
    assert moved(four)["attention's projections"][0][0] == half * (128 + 128) + 2 * 256 + (2 + 2 * half) * 128


def test_bytes_of_experts_with_a_clamp_and_biases() -> None:
    shape = replace(SMALL, clamped=True, linear_bias=True)
    bytes_of = moved(operations.layer(shape, Training(), ONE, Kind(True)))
    assert bytes_of["clamp"] == [(32 * 12 * 4 * 2, 32 * 12 * 5 * 2)]
    assert bytes_of["experts' bias"] == [(32 * 8 * (2 * 2 + 6 * 4), 32 * 8 * (2 * 2 + 8 * 4))]
    fused = moved(operations.layer(shape, Training(fused_experts=True), ONE, Kind(True)))
    assert not {"clamp", "experts' bias"} & set(fused)


def test_bytes_of_output_and_loss() -> None:
    bytes_of = moved(operations.head(SMALL, Training(), ONE))
    assert bytes_of["output layer"][0][0] == 2 * (128 + 256 + 512)
    assert bytes_of["loss"] == [(512 * (2 + 9 * 4), 512 * (3 * 4 + 2))]


TOKEN = 2 * 8  # bytes of a row


@pytest.mark.parametrize(
    ("recompute", "in_a_row", "rows"),
    [
        (Recompute(), 1, (9, 13)),
        (Recompute(), 5, (8.2, 12.2)),  # all but one of five meet the one before
        (Recompute("full"), 5, (9, 13)),
        (Recompute(connections=True), 5, (10, 14 + 4)),
        (Recompute("selective", ("layernorm",)), 5, (12, 24 + 4)),
        (Recompute("selective", ("core_attn",)), 1, (9, 13)),
    ],
)
def test_rows_of_frac_connections(recompute: Recompute, in_a_row: int, rows: tuple[float, float]) -> None:
    """Those of docs/kernels.md: without beta, alpha and parameters, whose share a width of 8,192 makes small."""
    shape = replace(SMALL, width=8192, connection=FracConfig(rate=2))
    training = Training(norms_apart=(True,) * 3, recompute=recompute)
    moves = operations.connection_moves(shape, training, False, in_a_row)
    for counted, expected in zip((moves.forward, moves.backward), rows, strict=True):
        per_token = counted.read_bytes_per_token + counted.written_bytes_per_token
        assert round(per_token / (2 * 8192), 1) == expected


@pytest.mark.parametrize("connection", [HyperConfig(slots=4), ManifoldConfig(slots=4)], ids=["dhc", "mhc"])
def test_wider_streams_run_torch_operations_and_the_stream_again(connection: ConnectionConfig) -> None:
    """Recompute of the stream runs forward once more, but for the norms, whose output is kept."""
    shape, again = replace(SMALL, width=64, connection=connection), Recompute(stream_layers=2)
    training = Training(norms_apart=(True,) * 3, fused_connections=False)
    stream = Stream(64)
    assert operations.connection_moves(shape, training, False) == torch_backend(stream, connection)
    moves = operations.connection_moves(shape, replace(training, recompute=again), False)
    once = torch_backend(stream, connection)
    more = moves.backward.total_bytes(7) - once.backward.total_bytes(7)
    assert more == once.forward.total_bytes(7) - 2 * norm(stream).forward.total_bytes(7)
    assert moves.forward == once.forward
    computed = flops.layer_again(shape, replace(training, recompute=again), Kind(False))
    assert computed.connections == computed.total == flops.layer(shape, Kind(False)).connections


def test_bytes_of_residuals_and_norms() -> None:
    """Two norms (2 and 3 rows), two sums (3), two of gradients (3 rows); the norms' statistics and weights."""
    connections = moved(operations.layer(SMALL, Training(), ONE, Kind(False)))["connections and norms"]
    forward = 16 * 2 * (5 * TOKEN + 4) + 2 * TOKEN
    assert connections == [(forward, 16 * 2 * (6 * TOKEN + 4) + 4 * TOKEN)]
    again = Training(norms_apart=(True, False, True), recompute=Recompute("selective", ("layernorm",)))
    one_norm = 16 * (2 * TOKEN + 4) + TOKEN  # the other is a part of the product
    assert moved(operations.layer(SMALL, again, ONE, Kind(False)))["connections and norms"][0][1] == (
        connections[0][1] + one_norm
    )


SHAPE = Shape((False,) * 8, width=1024, heads=8, groups=8, head_size=128, ffn=4096, vocabulary=32768, sequence=2048)
LAYOUT = Layout(nodes=2, gpus_per_node=8, micro_batch=1, global_batch=128, heads=8, layers=8)
LATE = Training(overlap_grad_reduce=False, overlap_param_gather=False)
STREAM = 2048 * 1024 * 2
PARAMETERS = model(SHAPE).total


ASSUMED = Assumptions(compute=0.6, compute_half=0.6, memory=0.8, nvlink=0.7, network=0.7, launch=0)


def step(layout: Layout = LAYOUT, training: Training = LATE, **assumed: float) -> StepTime:
    h100 = DEVICES["h100"]
    stages = work.of_stages(SHAPE, training, layout, h100)
    return step_time(stages, training, layout, h100, 50, replace(ASSUMED, **assumed))


@pytest.mark.parametrize(
    "connection", [None, FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4)], ids=str
)
def test_a_stage_without_layers_has_the_loss_alone(connection: ConnectionConfig | None) -> None:
    shape = replace(SHAPE, connection=connection)
    layout = replace(LAYOUT, nodes=3, pipeline=3, split=Split(stages=parsed("Et*4|t*4|L")))
    first, _, last = work.of_stages(shape, LATE, layout, DEVICES["h100"])
    head = operations.head(shape, LATE, layout)
    assert last.forward.bytes == sum(one.forward.bytes for one in head)
    assert first.forward.bytes > 4 * STREAM


def test_computation_is_the_sum_of_its_operations() -> None:
    once = 8 * operations.layer(SHAPE, LATE, LAYOUT, Kind(False)) + operations.head(SHAPE, LATE, LAYOUT)
    passes = [operation.forward for operation in once] + [operation.backward for operation in once]
    total = sum(one.bytes for one in passes)
    found = step()
    # Each head's scores are taken to their exponentials in forward, and again in backward.
    exponentials = 2 * 8 * 2048 * 8 * (2048 / 2 + 128 / 2)
    computing = sum(one.flops + one.wasted for one in passes) / (0.6 * 989.5e12) + exponentials / 3.9e12
    assert found.compute == pytest.approx(8 * computing)
    assert found.memory == pytest.approx(8 * total / (0.8 * 3350e9))
    assert found.launches == 0
    # Gradients set to 0, read twice on 1/16; there 16-bit weights written, three fp32 numbers read and written.
    update = PARAMETERS * (4 + (2 * 4 + 2 + 2 * 12) / 16)
    assert found.optimizer == pytest.approx(update / (0.8 * 3350e9))
    assert found.hbm_bytes == pytest.approx(8 * total + update)


def test_a_pass_takes_as_long_as_its_launches() -> None:
    """Of a layer 3 + 4 + 1 + 3 + 4 kernels, of the end 1 + 6; backward has twice as many."""
    kernels = 8 * (2 + 4 + 1 + 3 + 4) + 7
    slow = step(launch=1000)
    assert slow.compute + slow.memory + slow.launches == pytest.approx(8 * 3 * kernels * 1e-3)
    part = step(training=replace(LATE, captured=("attn",)), launch=1000)
    assert part.compute + part.memory + part.launches == pytest.approx(8 * 3 * (8 * 3 + 7) * 1e-3)
    assert step(training=replace(LATE, captured=("all",)), launch=1000) == step()


def test_data_parallel_sums_wait_or_run_beside_a_pass() -> None:
    """16 ranks in two nodes: a ring over 8 adapters of 50 GB/s is slower than NVLink's 450."""
    seconds = PARAMETERS * (4 + 2) * 15 / 16 / 400e9 / 0.7
    late = step()
    assert (late.network, late.hidden_network) == (pytest.approx(seconds), 0)
    assert late.network_bytes == pytest.approx(PARAMETERS * 6 * 15 / 16)
    assert late.total == late.compute + late.memory + late.network + late.optimizer
    early = step(training=Training())
    assert early.network + early.hidden_network == pytest.approx(seconds)
    one_micro_batch = (late.compute + late.memory) / 8
    assert early.hidden_network == pytest.approx(min(seconds, one_micro_batch))


def test_a_bubble_has_what_every_micro_batch_waits_for() -> None:
    """The last of 4 stages sends gradients alone, within its node; sums over data-parallel ranks are once a step."""
    found = step(replace(LAYOUT, pipeline=4))
    sends = 32 * STREAM / 450e9 / 0.7
    assert found.network > 1.5 * sends
    assert found.bubble == pytest.approx(3 * (found.compute + found.memory + sends) / 32)
    virtual = step(replace(LAYOUT, pipeline=4, virtual_pipeline=2))
    # Its first chunk's output goes to the first stage, on the other node, while the gradients of both take less.
    assert virtual.hidden_network == pytest.approx(32 * STREAM / 50e9 / 0.7)
    assert virtual.bubble == pytest.approx(3 / 2 * (virtual.compute + virtual.memory) / 32)


def test_tensor_parallel_collectives_wait() -> None:
    """Per layer and pass two pairs of linear layers, half of the stream on the way; embedding, output, loss."""
    layout = replace(LAYOUT, nodes=1, gpus_per_node=2, tensor=2)
    layers, ends = 8 * 2 * (2 + 3), 2 + 3
    sent = 128 * ((layers + ends) * STREAM / 2 + 3 * 2048 * 4) + 4 * (2 * 8 + 1) * 1024
    found = step(layout)
    assert found.network_bytes == pytest.approx(sent)
    assert found.network == pytest.approx(sent / 450e9 / 0.7)
    assert step(layout, replace(LATE, overlap_tensor=True)).network < found.network / 10


FORWARD, BACKWARD = Computed(4, 1), Computed(8, 2)
EVERYTHING = replace(Training(), overlap_tensor=True, overlap_experts=True)
STEPS = replace(ONE, global_batch=2)  # the experts' of one micro-batch have no other to run beside


@pytest.mark.parametrize(
    ("times", "training", "layout", "expected"),
    [
        # Beside one pass, not beside every micro-batch's; both groups share it.
        ({("backward", "dp-cp"): 6, ("backward", "expert_dp"): 6}, Training(), STEPS, Network(4, 0, 8)),
        ({("forward", "dp"): 3}, Training(overlap_param_gather=False), STEPS, Network(3, 0, 0)),
        (
            {("optimizer", "dp"): 3, ("optimizer", "tp"): 1, ("optimizer", "embedding"): 1},
            LATE,
            STEPS,
            Network(5, 0, 0),
        ),
        # Beside attention, of which recompute is a part of backward.
        ({("forward", "cp"): 3, ("recompute", "cp"): 3, ("backward", "cp"): 3}, LATE, STEPS, Network(3, 3, 6)),
        ({("forward", "tp"): 3, ("forward", "ep"): 3}, LATE, STEPS, Network(6, 6, 0)),
        # Everything together hides no more than the passes take.
        ({("forward", "cp"): 3, ("forward", "dp"): 3, ("forward", "tp"): 5}, EVERYTHING, STEPS, Network(3, 3, 8)),
        ({("forward", "ep"): 7}, EVERYTHING, STEPS, Network(3, 3, 4)),
        ({("backward", "tp"): 20}, EVERYTHING, STEPS, Network(4, 4, 16)),
        # What is overlapped are the tensor-parallel products, no experts and no balancing of them.
        (
            {("forward", "etp"): 1, ("forward", "tp-cp"): 1, ("forward", "etp-ep"): 1},
            EVERYTHING,
            STEPS,
            Network(3, 3, 0),
        ),
        ({("optimizer", "pp"): 30}, LATE, replace(STEPS, gpus_per_node=2, pipeline=2), Network(30, 30, 0)),
        (
            {("optimizer", "pp"): 30},
            LATE,
            replace(STEPS, gpus_per_node=2, pipeline=2, virtual_pipeline=2),
            Network(7, 7, 23),
        ),
    ],
)
def test_what_waits(times: dict[tuple[str, str], float], training: Training, layout: Layout, expected: Network) -> None:
    found = beside_computation(times, FORWARD, BACKWARD, training, layout)
    assert all(isclose(mine, theirs) for mine, theirs in zip(found, expected, strict=True)), found
