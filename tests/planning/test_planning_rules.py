"""Rules that planning follows, on models small enough to check by hand."""

from dataclasses import replace

import pytest

from megatron_fc import FracConfig
from megatron_fc.errors import UserError
from megatron_fc.planning import activations, flops, links, memory
from megatron_fc.planning.calibration import assumptions
from megatron_fc.planning.devices import DEVICES, device
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.shape import Kind, Recompute, Shape, Training
from megatron_fc.planning.sweep import overrides, sweep

SHAPE = Shape((False,) * 8, width=1024, heads=8, groups=8, head_size=128, ffn=4096, vocabulary=32768, sequence=2048)
LAYOUT = Layout(nodes=2, gpus_per_node=8, micro_batch=1, global_batch=128, heads=8, layers=8)
ASSUMED = assumptions(DEVICES["h100"], "half")
TRAINING = Training(target_tokens=10**12, captured=("all",))  # no launch hides what it launches
PLAN = Plan("test", SHAPE, TRAINING, LAYOUT, DEVICES["h100"], 50, ASSUMED)


def test_microbatches_in_flight_follow_1f1b_and_its_interleaved_form() -> None:
    four = replace(LAYOUT, pipeline=4)
    assert [memory.in_flight(Training(), four, stage) for stage in range(4)] == [[4], [3], [2], [1]]
    assert memory.in_flight(Training(), replace(four, global_batch=8), 0) == [2]  # there are no more of them
    interleaved = replace(four, virtual_pipeline=2)
    assert memory.in_flight(Training(), interleaved, 0) == [7, 4]
    assert memory.in_flight(Training(), interleaved, 3) == [4, 1]
    assert memory.in_flight(Training(group=8), interleaved, 3) == [8, 1]


def test_layers_are_dealt_out_stage_by_stage_then_chunk_by_chunk() -> None:
    layout = replace(LAYOUT, pipeline=2, virtual_pipeline=2)
    dealt = [[chunk.layers for chunk in layout.chunks(stage)] for stage in range(2)]
    assert dealt == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]


def test_full_recompute_keeps_one_stream_for_each_span() -> None:
    stream = activations.stream(SHAPE, Training(), LAYOUT)
    assert stream == 2048 * 1024 * 2
    ends = sum(
        t.bytes for t in activations.first(SHAPE, Training(), LAYOUT) + activations.last(SHAPE, Training(), LAYOUT)
    )
    for layers, spans in ((1, 8), (2, 4), (8, 1)):
        training = Training(recompute=Recompute("full", layers=layers))
        assert memory.of_stage(SHAPE, training, LAYOUT, 0).activations == spans * stream + ends
        assert flops.recomputed(SHAPE, training, LAYOUT).total == 8 * flops.layer(SHAPE, Kind(False)).total


def test_frac_connections_by_the_papers_formulas() -> None:
    shape = replace(SHAPE, connection=FracConfig(rate=4))
    d, m = 1024, 4
    assert flops.layer(shape, Kind(False)).connections == 2 * (2 * d * (2 * m + 1) + 4 * m * d + 2 * d)
    static = replace(SHAPE, connection=FracConfig(rate=4, dynamic=False))
    assert flops.layer(static, Kind(False)).connections == 2 * (4 * m * d + 2 * d)
    of_frac = [
        t.bytes
        for t in activations.layer(shape, Training(norms_apart=(True,) * 3), LAYOUT, False)
        if t.part == "connections"
    ]
    assert sum(of_frac) == 2 * 2048 * (2 * d + 4 * m)  # o and beta


def test_a_domain_is_as_much_of_nvlink_as_divides_the_world() -> None:
    rack = links.on_domains(replace(LAYOUT, nodes=64, gpus_per_node=4), DEVICES["gb200"])
    assert (rack.nodes, rack.gpus_per_node, rack.world) == (4, 64, 256)
    assert links.on_domains(LAYOUT, DEVICES["h100"]) == LAYOUT
    # Two machines of four GPUs are no NVLink domain of eight, and one of sixteen is two.
    halves = replace(LAYOUT, nodes=4, gpus_per_node=4)
    assert links.on_domains(halves, DEVICES["h100"]) == halves
    assert links.on_domains(replace(LAYOUT, nodes=1, gpus_per_node=16), DEVICES["h100"]) == LAYOUT


def test_experts_that_lie_on_other_ranks_are_summed_apart() -> None:
    """Megatron's layers choose the experts' groups where EP is above 1 or ETP is not TP."""
    moe = replace(SHAPE, moe_layers=(True,) * 8, experts=8, top_k=2, expert_ffn=1024)
    layout = replace(LAYOUT, tensor=2, experts=8)
    for expert, expert_tensor, apart in ((1, 1, True), (1, 2, False), (2, 2, True)):
        divided = replace(layout, expert=expert, expert_tensor=expert_tensor)
        groups = {key.group for key in links.sent(moe, Training(), divided, 0)}
        assert ("expert_dp" in groups, "dp" in groups) == (apart, True)


def test_more_of_anything_is_never_slower() -> None:
    step = PLAN.step.total
    assert replace(PLAN, network=500).step.total <= step
    assert replace(PLAN, gpu=DEVICES["b200"]).step.total < step
    assert replace(PLAN, assumed=replace(ASSUMED, compute=0.9)).step.total < step
    assert replace(PLAN, training=replace(PLAN.training, recompute=Recompute("full"))).step.total > step
    assert replace(PLAN, layout=replace(LAYOUT, pipeline=4)).step.bubble > 0 == PLAN.step.bubble


def test_no_estimate_beats_the_assumed_share_of_the_peak() -> None:
    for tried in sweep(PLAN).fitting:
        assert tried.mfu < PLAN.assumed.compute


def test_recompute_frees_a_norm_that_is_a_module_and_not_a_part_of_a_product() -> None:
    rows = 2048 * (1024 * 2 + 4)  # a norm's output and statistics

    def kept(modules: tuple[str, ...], norms_apart: tuple[bool, bool, bool]) -> float:
        training = Training(recompute=Recompute("selective", modules), norms_apart=norms_apart)
        return memory.of_stage(SHAPE, training, LAYOUT, 0).activations

    plain = kept((), (False, False, True))
    assert kept(("layernorm",), (False, False, True)) == plain
    assert kept(("layernorm",), (True, True, True)) == plain - 8 * 2 * rows
    inside = 8 * 2048 * 3 * 4096 * 2  # input and output of the activation function
    assert kept(("mlp",), (True, True, True)) == plain - inside
    assert kept(("mlp",), (False, False, True)) == plain - inside - 8 * rows


def test_recomputed_scores_are_there_for_a_moment() -> None:
    scores = 2048 * 8 * 2048 * (4 + 2)
    unfused = Training(flash=False)
    again = replace(unfused, recompute=Recompute("selective", ("core_attn",)))
    kept = {tensor.what: tensor.bytes for tensor in activations.layer(SHAPE, unfused, LAYOUT, False)}
    assert kept["attention scores"] == scores
    plain, recomputed = (memory.of_stage(SHAPE, training, LAYOUT, 0) for training in (unfused, again))
    assert recomputed.activations == plain.activations - 8 * scores
    assert recomputed.temporary == plain.temporary + scores > 2 * scores


def test_recompute_of_connections_takes_time() -> None:
    connected = replace(PLAN, shape=replace(SHAPE, connection=FracConfig(rate=4)))
    times = [
        replace(connected, training=replace(PLAN.training, recompute=recompute)).step.total
        for recompute in (Recompute(), Recompute(connections=True), Recompute("selective", ("layernorm",)))
    ]
    assert times == sorted(set(times))


def test_a_sweep_says_how_to_train_so_and_why_the_rest_does_not() -> None:
    found = sweep(PLAN)
    assert overrides(PLAN, PLAN) == []
    tensor = next(tried for tried in found.fitting if tried.layout.tensor == 2)
    assert {"tensor_model_parallel_size=2", "padded_vocab_size=32768"} <= set(overrides(tensor, PLAN))
    small = replace(PLAN, assumed=replace(ASSUMED, reserve=0.999))
    assert not sweep(small).fitting
    assert sweep(small).too_large


def test_a_sweep_divides_what_the_model_has() -> None:
    """No dense layer, no rule for its MLP; experts and the shared one are divided too."""
    moe = replace(SHAPE, moe_layers=(True,) * 8, ffn=1001, experts=8, top_k=2, expert_ffn=1024, shared_ffn=1022)
    plan = replace(PLAN, shape=moe, layout=replace(LAYOUT, experts=8))
    assert {tried.layout.tensor for tried in sweep(plan).fitting} == {1, 2}
    assert "moe_shared_expert_intermediate_size" in sweep(plan).impossible
    dense = sweep(replace(PLAN, shape=replace(SHAPE, ffn=1001)))
    assert {tried.layout.tensor for tried in dense.fitting} == {1}


def test_an_unknown_gpu_lists_those_that_are_known() -> None:
    assert device("H200").name == "H200 SXM"
    with pytest.raises(UserError, match="gpu=v100 is not known: choose one of a100, h100, h200, b200, gb200, b300, "):
        device("v100")
