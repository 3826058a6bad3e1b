"""The model of network bytes on layouts too large to run; `tests/distributed/test_network_bytes.py` has real ones."""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.planning.counts import NetworkCounts, NetworkKey, total_network
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.network import Routing, network_bytes
from megatron_fc.planning.shape import Recompute, Shape, Training

# OLMoE-7B of configs/olmoe_7b.yaml.
OLMOE = Shape(
    moe_layers=(True,) * 16,
    width=2048,
    heads=16,
    groups=16,
    head_size=128,
    ffn=1024,
    vocabulary=50304,
    sequence=4096,
    experts=64,
    top_k=8,
    expert_ffn=1024,
    qk_norm=True,
    over_heads=True,
    connection=FracConfig(rate=4),
)
DENSE = replace(OLMOE, moe_layers=(False,) * 16, experts=0, top_k=0, expert_ffn=0)
EIGHT_NODES = Layout(
    nodes=8, gpus_per_node=8, expert=8, micro_batch=2, global_batch=1024, heads=16, layers=16, experts=64
)
ROW = 2048 * 2  # bytes of a token's stream in bf16
TOKENS = 2 * 4096 * 8  # of a rank's step: 8 micro-batches of 2 sequences


def step(shape: Shape, layout: Layout, rank: int = 0, training: Training | None = None) -> NetworkCounts:
    return network_bytes(shape, layout, training or Training(), rank)


def payload(counts: NetworkCounts, chosen: Callable[[NetworkKey], bool]) -> int:
    return sum(count.payload_bytes for key, count in counts.items() if chosen(key))


def test_experts_on_one_node_stay_there() -> None:
    counts = step(OLMOE, EIGHT_NODES)
    tokens = total_network(count for key, count in counts.items() if key.collective == "all_to_all")
    # Seven of eight rows leave the rank: to the experts and back in forward, and in backward; so do, to the experts in
    # forward and back in backward, their fp32 probabilities.
    assert tokens.payload_bytes == 16 * TOKENS * 8 * 7 // 8 * (4 * ROW + 2 * 4)
    assert (tokens.intra_node_bytes, tokens.inter_node_bytes) == (tokens.payload_bytes, 0)


def test_experts_over_two_nodes_send_half_of_their_rows_out() -> None:
    counts = step(OLMOE, replace(EIGHT_NODES, expert=16))
    tokens = total_network(count for key, count in counts.items() if key.collective == "all_to_all")
    assert tokens.inter_node_bytes == 16 * TOKENS * 8 // 2 * (4 * ROW + 2 * 4)
    assert tokens.intra_node_bytes == 16 * TOKENS * 8 * 7 // 16 * (4 * ROW + 2 * 4)


def test_given_rows_replace_balanced_ones() -> None:
    layout = replace(EIGHT_NODES, nodes=1, global_batch=128)
    sent, received = [0, 10, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 7]
    routing = dict.fromkeys(range(16), Routing(sent, received))
    counts = network_bytes(OLMOE, layout, Training(), 0, routing=routing)
    forward = counts[NetworkKey("forward", "ep", "all_to_all")]
    backward = counts[NetworkKey("backward", "ep", "all_to_all")]
    assert forward.payload_bytes == 16 * (10 * (ROW + 4) + 7 * ROW)
    assert backward.payload_bytes == 16 * (10 * ROW + 7 * (ROW + 4))


def test_gradients_and_weights_of_every_parameter_once_a_step() -> None:
    counts = step(OLMOE, EIGHT_NODES)
    # 6,919,161,856 parameters and 165,056 of Frac-Connections, as the config says; 64 experts of 3 matrices on 8 ranks.
    experts = 16 * 64 * 3 * 2048 * 1024 // 8
    dense, frac = 6_919_161_856 - 8 * experts, 165_056
    reduced = {key.group: count for key, count in counts.items() if key.collective == "reduce_scatter"}
    gathered = {
        key.group: count for key, count in counts.items() if key.collective == "all_gather" and "dp" in key.group
    }
    assert reduced["dp"].payload_bytes == 4 * (dense + frac)
    assert reduced["expert_dp"].payload_bytes == 4 * experts
    assert gathered["dp"].payload_bytes == 2 * dense + 4 * frac
    assert gathered["expert_dp"].payload_bytes == 2 * experts
    # 64 ranks in a ring: the first has its next rank on its own node. Holders of the same experts are 8 ranks apart.
    assert reduced["dp"].intra_node_bytes == 4 * (dense + frac) * 63 // 64
    assert reduced["expert_dp"].inter_node_bytes == 4 * experts * 7 // 8


def test_the_last_rank_of_a_node_sends_to_the_next_node() -> None:
    key = NetworkKey("backward", "dp", "reduce_scatter")
    assert step(OLMOE, EIGHT_NODES, rank=6)[key].inter_node_bytes == 0
    assert step(OLMOE, EIGHT_NODES, rank=7)[key].intra_node_bytes == 0


@pytest.mark.parametrize("rank", [0, 63])
@pytest.mark.parametrize(
    ("connection", "ratio"),
    [
        *((FracConfig(rate=rate), 1) for rate in (2, 4, 8)),
        (ManifoldConfig(slots=4, fractions=4), 1),
        (HyperConfig(slots=4), 4),
        (HyperConfig(slots=4, fractions=2), 2),
        (ManifoldConfig(slots=2, leave="learned"), 2),
    ],
    ids=str,
)
def test_connections_send_gradients_and_between_stages_their_stream(
    connection: ConnectionConfig, ratio: int, rank: int
) -> None:
    layout = replace(EIGHT_NODES, tensor=2, pipeline=2, expert_tensor=1, context=2, virtual_pipeline=2)
    without = step(replace(OLMOE, connection=None), layout, rank)
    counts = step(replace(OLMOE, connection=connection), layout, rank)
    stream = NetworkKey("optimizer", "pp", "send")
    differing = {key for key in counts if counts[key] != without[key]}
    gradients = {
        NetworkKey("backward", "dp-cp", "reduce_scatter"),
        NetworkKey("forward", "dp-cp", "all_gather"),
        NetworkKey("optimizer", "tp", "all_reduce"),
    }
    assert differing == (gradients if ratio == 1 else gradients | {stream})
    assert counts[stream].payload_bytes == ratio * without[stream].payload_bytes
    more = 16 * connection.parameter_count(2048)  # of the 8 layers of two chunks
    if rank == 63:
        more += sum(map(prod, connection.leave_shapes(2048).values()))
    for key in gradients:
        assert counts[key].payload_bytes - without[key].payload_bytes == 4 * more


def test_tensor_parallelism_sends_the_same_with_and_without_sequence_parallelism() -> None:
    # An all-reduce is a reduce-scatter and an all-gather; what comes on top is the input gathered again for weights.
    layout = replace(EIGHT_NODES, tensor=8, expert=1, expert_tensor=8)
    stream = TOKENS * 8 * ROW  # 64 micro-batches
    divided = step(DENSE, layout)
    whole = step(DENSE, layout, training=Training(sequence_parallel=False))

    def is_stream(key: NetworkKey) -> bool:
        return key.group == "tp" and key.phase != "optimizer"

    again = 16 * 2 + 1  # per layer qkv and fc1, once the output layer
    loss = 3 * 4 * TOKENS * 8
    heads = 16 * 4 * 4 * TOKENS * 8  # a number per token for queries and for keys, forward and backward
    assert payload(whole, is_stream) == (16 * 4 + 2) * stream + loss + heads
    assert payload(divided, is_stream) == 2 * (16 * 4 + 2) * stream + again * stream + loss + heads


def test_norms_of_queries_and_keys_are_summed_without_sequence_parallelism_too() -> None:
    layout = replace(EIGHT_NODES, tensor=8, expert=1, expert_tensor=8)
    for over_heads, weights in ((False, 128), (True, 2048)):
        counts = step(replace(DENSE, over_heads=over_heads), layout, training=Training(sequence_parallel=False))
        assert counts[NetworkKey("optimizer", "tp", "all_reduce")].payload_bytes == 16 * 2 * weights * 4


def test_stages_send_streams_forward_and_their_gradients_back() -> None:
    layout = replace(EIGHT_NODES, pipeline=4, virtual_pipeline=2)
    key, stream = NetworkKey("optimizer", "pp", "send"), 2 * 4096 * ROW
    micro_batches = layout.accumulation_steps
    sends = [step(OLMOE, layout, rank=16 * stage)[key] for stage in range(4)]
    assert [send.calls for send in sends] == [
        3 * micro_batches,
        4 * micro_batches,
        4 * micro_batches,
        3 * micro_batches,
    ]
    assert [send.payload_bytes for send in sends] == [send.calls * stream for send in sends]
    assert all(send.intra_node_bytes == 0 for send in sends)


def test_the_ring_of_context_parallelism() -> None:
    layout = replace(EIGHT_NODES, context=4, expert=8)
    counts = step(OLMOE, layout)
    part = 2 * 4096 // 4 * 2 * 2048 * 2  # keys and values of this rank's tokens
    hops = 3 * layout.accumulation_steps * 16
    assert counts[NetworkKey("forward", "cp", "send")].payload_bytes == hops * part
    assert counts[NetworkKey("backward", "cp", "send")].payload_bytes == 2 * hops * part
    grouped = step(replace(OLMOE, groups=4), layout)
    assert grouped[NetworkKey("forward", "cp", "send")].payload_bytes == hops * part // 4


def test_recompute_of_attention_goes_around_the_ring_again() -> None:
    layout = replace(EIGHT_NODES, context=4, tensor=2)
    counts = step(OLMOE, layout, training=Training(recompute=Recompute("selective", ("core_attn",))))
    again = {key: count for key, count in counts.items() if key.phase == "recompute"}
    assert again == {NetworkKey("recompute", "cp", "send"): counts[NetworkKey("forward", "cp", "send")]}


def test_block_recompute_repeats_the_first_layers_of_a_stage() -> None:
    layout = replace(EIGHT_NODES, pipeline=2)
    counts = step(OLMOE, layout, training=Training(recompute=Recompute("full", method="block", layers=2)))
    forward = counts[NetworkKey("forward", "ep", "all_to_all")]
    again = counts[NetworkKey("recompute", "ep", "all_to_all")]
    assert (again.calls, again.payload_bytes) == (forward.calls // 4, forward.payload_bytes // 4)


def test_one_rank_sends_nothing() -> None:
    layout = replace(EIGHT_NODES, nodes=1, gpus_per_node=1, expert=1, global_batch=16)
    assert step(OLMOE, layout) == {}


def test_experts_want_sequence_parallelism() -> None:
    layout = replace(EIGHT_NODES, tensor=2)
    with pytest.raises(UserError, match="tensor_model_parallel_size=2 with experts needs sequence_parallel"):
        step(OLMOE, layout, training=Training(sequence_parallel=False))
