"""The constants, the published runs that they are fitted to, and what is said of them."""

from dataclasses import replace
from math import exp, log

import pytest

import fit_plan
from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.planning import calibration
from megatron_fc.planning.calibration import assumptions, refuse_impossible
from megatron_fc.planning.devices import DEVICES
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.plan import Plan
from megatron_fc.planning.shape import Shape, Training
from published import MODELS, SPLITS, Row, rows

ROWS = rows(fit_plan.ROWS)
RECENT = [row for row in ROWS if row.is_recent and not row.has_regression]

OLMOE = Shape((True,) * 16, 2048, 16, 16, 128, 1024, 50304, 4096, experts=64, top_k=8, expert_ffn=1024, qk_norm=True)
ON_256 = Layout(
    nodes=32, gpus_per_node=8, expert=8, micro_batch=2, global_batch=1024, heads=16, layers=16, experts=64
)  # fmt: skip


def planned(connection: ConnectionConfig | None, gpu: str = "h100", **training: object) -> Plan:
    how = Training(norms_apart=(connection is not None,) * 2 + (True,), target_tokens=3 * 10**12, **training)  # type: ignore[arg-type]
    device = DEVICES[gpu]
    shape, constants = replace(OLMOE, connection=connection), assumptions(device, "half")
    return Plan("OLMoE-7B", shape, how, ON_256, device, device.network_gb_per_second, constants)


def named_values() -> dict[str, float]:
    """The constants in use, by the names of the fit."""
    values = {}
    for family, products in fit_plan.COMPUTES:
        values[f"compute {family} {products}"] = calibration._data()["constants"]["compute"][family][products]
    for name in fit_plan.OTHERS_BEFORE:
        kind, _, family = name.partition(" ")
        constant = calibration._data()["constants"][kind]
        values[name] = constant[family] if family else constant
    return values


@pytest.mark.parametrize("row", ROWS, ids=[f"{number} {row.name}" for number, row in enumerate(ROWS)])
def test_every_published_row_is_planned_and_fits(row: Row) -> None:
    """No layout is refused, and each ran: with no more than its GPU has."""
    assert row.plan.layout.problem() is None
    assert row.plan.memory.total < row.plan.gpu.hbm_bytes
    assert MODELS[row.model].layers == sum(row.plan.layout.layers_of_stages)


def test_rows_that_others_may_have_are_planned() -> None:
    """94 and 126 layers, with embedding and loss counted as layers."""
    for model, pipeline, virtual in (("Qwen3_235B_a22B", 8, 4), ("LLAMA31_405B", 8, 8), ("LLAMA31_405B", 16, 8)):
        shape = MODELS[model]
        split = next(split for split in SPLITS if split.problem(shape.layers, pipeline, virtual) is None)
        layout = replace(RECENT[0].plan.layout, pipeline=pipeline, virtual_pipeline=virtual, split=split)
        layout = replace(layout, layers=shape.layers, expert=1, experts=0, heads=shape.heads)
        assert layout.problem() is None
        assert sum(layout.layers_of_stages) == shape.layers


def test_constants_in_use_explain_the_rows() -> None:
    """The errors of docs/plan.md."""
    off = sorted(abs(exp(fit_plan.error(named_values(), row)) - 1) for row in RECENT)
    assert off[len(off) // 2] <= 0.06
    assert sum(one <= 0.3 for one in off) / len(off) >= 0.9


@pytest.mark.slow
def test_constants_in_use_are_those_that_fit_and_predict_what_they_have_not_seen() -> None:
    values = fit_plan.fit(RECENT)
    assert fit_plan.told(values) == calibration._data()["constants"]
    _, apart = fit_plan.without_each_model(RECENT)
    off = sorted(abs(exp(one) - 1) for one in apart.values())
    assert off[len(off) // 2] <= 0.15
    assert sum(one <= 0.3 for one in off) / len(off) >= 0.9
    of_experts = [one for row, one in apart.items() if any(row.plan.shape.moe_layers)]
    low, high = calibration.error_range(True)
    inside = sum(log(1 / high) <= one <= log(1 / low) for one in of_experts)
    assert inside / len(of_experts) == pytest.approx(0.8, abs=0.05)


def test_a_plan_says_what_it_rests_on() -> None:
    plan = planned(None)
    assert plan.is_calibrated
    low, high = plan.speed_range or (0, 0)
    assert low < plan.tokens_per_second < high
    assert "H100" in plan.nearest.name
    assert plan.nearest.times >= 256 / 64  # no published run had as many
    assert plan.nearest.size in plan.sizes
    for other in (planned(None, "h200"), replace(plan, assumed=replace(plan.assumed, memory=0.5))):
        assert not other.is_calibrated
        assert other.speed_range is None
    own = next(row for row in RECENT if "Qwen" in row.model).plan
    assert calibration.nearest(own.gpu, own.sizes).times == 1


KINDS = [FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(slots=4), ManifoldConfig(slots=4, fractions=4)]


@pytest.mark.parametrize("connection", [*KINDS, HyperConfig(slots=4, fractions=2)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_the_difference_is_known_better_than_the_whole(connection: ConnectionConfig, fused: bool) -> None:
    plan = planned(connection, fused_connections=fused)
    least, most = plan.slowdown_range
    low, high = plan.speed_range or (0, 0)
    assert -0.02 <= least < most
    assert (1 + most) / (1 + least) < high / low


def test_a_wider_stream_costs_more_and_its_stages_send_more() -> None:
    narrow, wide = planned(FracConfig(rate=4)), planned(HyperConfig(slots=4))
    assert narrow.slowdown_range[1] < wide.slowdown_range[1]
    assert planned(None).slowdown_range == (0, 0)
    stages = [replace(plan, layout=replace(ON_256, pipeline=4)) for plan in (narrow, wide)]
    assert stages[1].step.pipeline_bytes == 4 * stages[0].step.pipeline_bytes


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({"memory": 2.0}, "memory=2.0 must be greater than 0 and at most 1"), ({"launch": -1.0}, "launch=-1.0 must be")],
)
def test_constants_that_cannot_be(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        refuse_impossible(values)
