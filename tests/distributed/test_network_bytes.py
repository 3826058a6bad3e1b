"""The model of network bytes against the counter, for every layout: what one step of a real Megatron sends.

Phases, groups, collectives and nodes are compared byte by byte; what the model leaves out is listed in `left_out`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.planning import layout as sizes
from megatron_fc.planning.counts import NetworkCounts, NetworkKey
from megatron_fc.planning.network import network_bytes
from megatron_fc.planning.placement import Placement
from megatron_fc.planning.ring import ring_all_gather_bytes, ring_all_reduce_bytes, ring_reduce_scatter_bytes
from megatron_fc.planning.shape import Recompute, Shape, Training
from support import harness, tiny
from support.layouts import BY_NAME, DFC, DHC, LAYOUTS, MHC, OLMOE, Layout, Model, models_of
from support.ranks import BATCH, MICRO_BATCHES, RECOMPUTE, Counted

pytestmark = pytest.mark.slow
NODES = 2
FP32_BYTES = 4


# The model knows no uneven stages and no shapes on the way, which scripts alone send that widen no buffers.
EVEN = [layout for layout in LAYOUTS if not (layout.stages or layout.exchanges_shapes)]


@pytest.mark.parametrize("layout", EVEN, ids=lambda layout: layout.name)
def test_model_equals_counter(layout: Layout, tmp_path: Path) -> None:
    check(layout, model_of(layout), tmp_path)


@pytest.mark.parametrize("layout", ["PP2", "TP2+SP+PP2"])
@pytest.mark.parametrize("connection", [DHC, MHC], ids=lambda connection: connection.label)
def test_stages_send_wider_streams_whole(connection: ConnectionConfig, layout: str, tmp_path: Path) -> None:
    """Four streams of 64 values per token, two micro-batches of two sequences; a tensor rank sends its tokens."""
    one = BY_NAME[layout]
    ranks = check(one, replace(model_of(one), connection=connection), tmp_path)
    sends = [c.counts.get(NetworkKey("optimizer", "pp", "send")) for c in ranks]
    whole = 4 * tiny.WIDTH * FP32_BYTES * MICRO_BATCHES * BATCH * tiny.SEQUENCE
    assert [send and send.inter_node_bytes for send in sends] == [whole // one.tp] * one.world


def test_half_precision_keeps_connections_in_fp32(tmp_path: Path) -> None:
    layout = BY_NAME["DP2 distributed optimizer"]
    check(layout, replace(model_of(layout), bf16=True), tmp_path)


def test_tied_embeddings_are_summed_between_first_and_last_stage(tmp_path: Path) -> None:
    layout = BY_NAME["TP2+SP+PP2"]
    ranks = check(layout, replace(model_of(layout), tied=True), tmp_path)
    assert all(any(key.group == "embedding" for key in counted.counts) for counted in ranks)


def test_norms_over_all_heads_add_up_their_squares(tmp_path: Path) -> None:
    layout = BY_NAME["TP2+SP+PP2"]
    [model] = [model for model in models_of(layout) if model.norms == OLMOE]
    check(layout, model, tmp_path / "kept", qk_norm=True, over_heads=True)
    check(layout, model, tmp_path / "recomputed", RECOMPUTE, Recompute("full"), qk_norm=True, over_heads=True)


def test_shared_experts(tmp_path: Path) -> None:
    layout = BY_NAME["TP2+SP+EP2"]
    more = {"moe_shared_expert_intermediate_size": 32}
    check(layout, model_of(layout), tmp_path, more, shared_ffn=32)


def test_full_recompute_sends_forward_again(tmp_path: Path) -> None:
    layout = BY_NAME["TP2+SP+EP2"]
    ranks = check(layout, model_of(layout), tmp_path, RECOMPUTE, Recompute("full"))
    for counted in ranks:
        assert {key.group for key in counted.counts if key.phase == "recompute"} == {"tp", "ep"}


def test_selective_recompute_sends_its_modules_again(tmp_path: Path) -> None:
    layout = BY_NAME["TP2+SP+EP2"]
    more = {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}
    check(layout, model_of(layout), tmp_path, more, Recompute("selective", ("mlp", "moe")))


def check(
    layout: Layout,
    model: Model,
    folder: Path,
    more: dict[str, Any] | None = None,
    recompute: Recompute | None = None,
    **shape: Any,
) -> list[Counted]:
    """Count on all ranks, compare each with the model; `more` goes to Megatron, `shape` to the model of bytes."""
    training = Training(
        element_bytes=2 if model.bf16 else FP32_BYTES,
        distributed_optimizer=layout.distributed_optimizer,
        sequence_parallel=layout.sequence,
        recompute=recompute or Recompute(),
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
    )
    ranks = harness.run("count_network", layout.world, folder, layout, model, more or {})
    for rank, counted in enumerate(ranks):
        assert sent(counted.counts) == expected(layout, replace(shape_of(model), **shape), training, rank, counted)
        assert repr(counted.losses) == repr(counted.plain_losses)  # to the bit, nan included
    return ranks


def model_of(layout: Layout) -> Model:
    return next(model for model in models_of(layout) if model.connection == DFC)


def sent(counts: NetworkCounts) -> dict[NetworkKey, tuple[int, int]]:
    """Bytes within the node and to the other one; receiving and waiting send nothing."""
    pairs: dict[NetworkKey, tuple[int, int]] = {}
    for key, count in counts.items():
        if count.intra_node_bytes or count.inter_node_bytes:
            add(pairs, key, count.intra_node_bytes, count.inter_node_bytes)
    return pairs


def add(pairs: dict[NetworkKey, tuple[int, int]], key: NetworkKey, intra_node: int, inter_node: int) -> None:
    before = pairs.get(key, (0, 0))
    pairs[key] = before[0] + intra_node, before[1] + inter_node


def expected(
    layout: Layout, shape: Shape, training: Training, rank: int, counted: Counted
) -> dict[NetworkKey, tuple[int, int]]:
    """What the model says, and what it leaves out."""
    shared = shared_layout(layout)
    modelled = network_bytes(shape, shared, training, rank, routing=counted.routing)
    result = sent({as_counted(key): count for key, count in modelled.items()})
    place = Placement(shared, rank)
    for key, bytes_sent, to in left_out(layout, place, counted.padding_bytes):
        here = place.is_on_this_node(to)
        add(result, key, bytes_sent if here else 0, 0 if here else bytes_sent)
    return result


def as_counted(key: NetworkKey) -> NetworkKey:
    """Transformer Engine's ring needs a GPU: `TorchAttention` gathers keys and values and sums their gradients over
    all ranks, which sends the same bytes by the ring algorithm.
    """
    if (key.group, key.collective) == ("cp", "send"):
        return NetworkKey(key.phase, "cp", "all_gather" if key.phase == "forward" else "all_reduce")
    return key


def left_out(layout: Layout, place: Placement, padding_bytes: tuple[int, int]) -> Iterator[tuple[NetworkKey, int, int]]:
    """Key, bytes and receiver of what the model does not count."""
    world = "tp-cp-dp-pp"
    reduced = {
        "loss and tokens, reported": ("dp-cp", 2),
        "norm of the gradient": (world if layout.distributed_optimizer else "tp-pp", 1),
    }
    if layout.ep > 1:
        reduced["norm of the experts' gradient"] = ("etp-ep-pp", 1)
    for kinds, numbers in reduced.values():
        name = "world" if kinds == world else place.name(kinds)
        if place.size(kinds) > 1:
            key = NetworkKey("optimizer", name, "all_reduce")
            yield key, ring_all_reduce_bytes(numbers * FP32_BYTES, place.size(kinds)), place.following(kinds)
    if layout.distributed_optimizer:
        group, size, to = place.name("dp-cp"), place.size("dp-cp"), place.following("dp-cp")
        backward, forward = ("backward", "forward") if layout.overlap else ("optimizer", "optimizer")
        gradients, weights = padding_bytes
        yield NetworkKey(backward, group, "reduce_scatter"), ring_reduce_scatter_bytes(gradients, size), to
        yield NetworkKey(forward, group, "all_gather"), ring_all_gather_bytes(weights, size), to


def shape_of(model: Model) -> Shape:
    config = tiny.transformer_config(model.kind, **model.options())
    moe = [False] * model.layers if model.kind == "dense" else [False] + [True] * (model.layers - 1)
    return Shape(
        moe_layers=tuple(moe),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head_size=config.kv_channels,
        ffn=config.ffn_hidden_size,
        vocabulary=tiny.VOCABULARY,
        sequence=tiny.SEQUENCE,
        experts=config.num_moe_experts or 0,
        top_k=config.moe_router_topk,
        expert_ffn=config.moe_ffn_hidden_size or 0,
        tied=model.tied,
        connection=model.connection,
    )


def shared_layout(layout: Layout) -> sizes.Layout:
    return sizes.Layout(
        nodes=NODES,
        gpus_per_node=layout.world // NODES,
        tensor=layout.tp,
        pipeline=layout.pp,
        virtual_pipeline=layout.vpp or 1,
        context=layout.cp,
        expert=layout.ep,
        expert_tensor=layout.expert_tp or layout.tp,
        micro_batch=BATCH,
        global_batch=BATCH * MICRO_BATCHES,
        heads=4,
        layers=layout.layers,
        experts=4,
    )
