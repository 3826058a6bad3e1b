"""Rules that planning follows, on models small enough to check by hand."""

from dataclasses import replace

import pytest

from megatron_fc import FracConfig
from megatron_fc.errors import UserError
from megatron_fc.layout import Layout
from megatron_fc.planning import activations, flops, links, memory, parameters
from megatron_fc.planning.devices import DEVICES, device
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.roofline import Assumptions
from megatron_fc.planning.shape import Recompute, Shape, Training
from megatron_fc.planning.sweep import overrides, sweep

SHAPE = Shape((False,) * 8, width=1024, heads=8, groups=8, head_size=128, ffn=4096, vocabulary=32768, sequence=2048)
LAYOUT = Layout(nodes=2, gpus_per_node=8, micro_batch=1, global_batch=128, heads=8, layers=8)
PLAN = Plan("test", SHAPE, Training(target_tokens=10**12), LAYOUT, DEVICES["h100"], 50, Assumptions())


def test_microbatches_in_flight_follow_1f1b_and_its_interleaved_form() -> None:
    four = replace(LAYOUT, pipeline=4)
    assert [memory.in_flight(four, stage) for stage in range(4)] == [[4], [3], [2], [1]]
    assert memory.in_flight(replace(four, global_batch=8), 0) == [2]  # there are no more of them
    interleaved = replace(four, virtual_pipeline=2)
    assert memory.in_flight(interleaved, 0) == [7, 4]
    assert memory.in_flight(interleaved, 3) == [4, 1]


def test_layers_are_dealt_out_stage_by_stage_then_chunk_by_chunk() -> None:
    layout = replace(LAYOUT, pipeline=2, virtual_pipeline=2)
    dealt = [parameters.chunk_layers(8, layout, stage) for stage in range(2)]
    assert dealt == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]


def test_full_recompute_keeps_one_stream_for_each_span() -> None:
    stream = activations.layer_input(SHAPE, Training(), LAYOUT)
    assert stream == 2048 * 1024 * 2
    ends = sum(
        t.bytes for t in activations.first(SHAPE, Training(), LAYOUT) + activations.last(SHAPE, Training(), LAYOUT)
    )
    for layers, spans in ((1, 8), (2, 4), (8, 1)):
        training = Training(recompute=Recompute("full", layers=layers))
        assert memory.of_stage(SHAPE, training, LAYOUT, 0).activations == spans * stream + ends
        assert flops.recomputed(SHAPE, training, 8).total == 8 * flops.layer(SHAPE, False).total


def test_frac_connections_by_the_papers_formulas() -> None:
    shape = replace(SHAPE, frac=FracConfig(rate=4))
    d, m = 1024, 4
    assert flops.site(shape) == 2 * d * (2 * m + 1) + 4 * m * d + 2 * d
    static = replace(SHAPE, frac=FracConfig(rate=4, dynamic=False))
    assert flops.site(static) == 4 * m * d + 2 * d
    of_frac = [
        t.bytes
        for t in activations.layer(shape, Training(norms_in_width=(True,) * 3), LAYOUT, False)
        if t.part == "frac"
    ]
    assert sum(of_frac) == 2 * 2048 * (2 * d + 4 * m)  # o and beta


def test_a_domain_is_as_much_of_nvlink_as_divides_the_world() -> None:
    rack = links.on_domains(replace(LAYOUT, nodes=64, gpus_per_node=4), DEVICES["gb200"])
    assert (rack.nodes, rack.gpus_per_node, rack.world) == (4, 64, 256)
    assert links.on_domains(LAYOUT, DEVICES["h100"]) == LAYOUT


def test_more_of_anything_is_never_slower() -> None:
    step = PLAN.step.total
    assert replace(PLAN, network=500).step.total <= step
    assert replace(PLAN, gpu=DEVICES["b200"]).step.total < step
    assert replace(PLAN, assumed=Assumptions(compute=0.9)).step.total < step
    assert replace(PLAN, training=replace(PLAN.training, recompute=Recompute("full"))).step.total > step
    assert replace(PLAN, layout=replace(LAYOUT, pipeline=4)).step.bubble > 0 == PLAN.step.bubble


def test_no_estimate_beats_the_assumed_share_of_the_peak() -> None:
    for tried in sweep(PLAN).fitting:
        assert tried.mfu < PLAN.assumed.compute


def test_a_sweep_says_how_to_train_so_and_why_the_rest_does_not() -> None:
    found = sweep(PLAN)
    assert overrides(PLAN, PLAN) == []
    tensor = next(tried for tried in found.fitting if tried.layout.tensor == 2)
    assert {"tensor_model_parallel_size=2", "make_vocab_size_divisible_by=128"} <= set(overrides(tensor, PLAN))
    small = replace(PLAN, assumed=Assumptions(reserve=0.999))
    assert not sweep(small).fitting
    assert sweep(small).too_large


def test_an_unknown_gpu_lists_those_that_are_known() -> None:
    assert device("H200").name == "H200 SXM"
    with pytest.raises(UserError, match="gpu=v100 is not known: choose one of a100, h100, h200, b200, gb200"):
        device("v100")
