"""What stands beside a counted residual stream."""

from dataclasses import replace

import pytest

from megatron_fc.connections import HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs.eager_traffic import torch_backend
from megatron_fc.connections.costs.traffic import Stream, enter, hyper_ideal
from megatron_fc.profiling.records import report_of
from megatron_fc.profiling.report.side_by_side import StreamBytes, side_by_side
from support.example_report import RUN, parts


def test_counted_first_then_computed() -> None:
    report, twin = report_of(parts()), report_of(parts("residual"))
    streams = side_by_side(report, [twin])
    assert [stream.label for stream in streams if not stream.is_computed] == ["residual", "dfc_x4, torch"]
    computed = ["residual", "dfc_x4, torch", "dfc_x4, fused"]
    computed += ["HC n=2, ideal", "HC n=4, ideal", "HC n=2, unfused", "HC n=4, unfused"]
    assert [stream.label for stream in streams if stream.is_computed] == computed
    assert streams[1].phases == report.stream_bytes_per_token_and_layer()


def test_ratios_are_to_residuals_of_the_same_origin() -> None:
    report, twin = report_of(parts(weight=3)), report_of(parts("residual"))
    ratios = {(stream.label, stream.is_computed): stream.ratio for stream in side_by_side(report, [twin])}
    assert ratios["residual", False] == ratios["residual", True] == 1
    assert ratios["dfc_x4, torch", False] == 3
    assert ratios["HC n=4, ideal", True] == pytest.approx(50 / 22, rel=0.02)
    assert side_by_side(report)[0].ratio is None, "no residual was counted"


def test_hyper_connections_move_their_streams() -> None:
    """20 + 30 rows of 64 elements in bf16 at n = 4."""
    ideal = _of("HC n=4, ideal", RUN)
    assert ideal.phases == {"forward": 20 * 128, "backward": 30 * 128}
    moves = hyper_ideal(Stream(64), HyperConfig(slots=4))
    assert ideal.total == moves.forward.total_bytes(1) + moves.backward.total_bytes(1)


@pytest.mark.parametrize(
    ("model", "layout", "factor"),
    [
        ({"params_dtype": "torch.float32"}, {}, 2),
        ({"fp32_residual_connection": True}, {}, 2),
        ({}, {"sequence_parallel": False}, 2),
        ({}, {"sequence_parallel": False, "tp": 1}, 1),
    ],
)
def test_wider_elements_and_copies_on_tensor_ranks(model: dict, layout: dict, factor: int) -> None:
    run = replace(RUN, model={**RUN.model, **model}, layout={**RUN.layout, **layout})
    assert _of("HC n=4, ideal", run).total == factor * 50 * 128


def test_fused_kernels_are_computed_where_they_did_not_run() -> None:
    """9 + 13 rows, and small terms."""
    assert 22 * 128 < _of("dfc_x4, fused", RUN).total < 27 * 128
    on_a_card = replace(report_of(parts()), run=replace(RUN, backend="triton"))
    assert [stream.label for stream in side_by_side(on_a_card)][:3] == ["dfc_x4", "residual", "HC n=2, ideal"]


@pytest.mark.parametrize(
    ("config", "label", "rows"),
    [
        # 4 r + 4 and 6 r + 6 rows, in the first of two layers r and r more; a quarter of entering, r + 1 twice.
        (HyperConfig(slots=4), "dhc_x4", 20 + 30 + (4 + 4) / 2 + (5 + 5) / 4),
        (HyperConfig(slots=4, fractions=2), "dhc_x4_m2", 12 + 18 + (2 + 2) / 2 + (3 + 3) / 4),
        (ManifoldConfig(slots=4), "mhc_x4", 20 + 30 + (4 + 4) / 2 + (5 + 5) / 4),
        (ManifoldConfig(slots=4, fractions=4), "mfc_x4", 8 + 12 + (1 + 1) / 2),
    ],
)
def test_any_kind_stands_beside_what_its_torch_operations_and_fused_kernels_would_move(
    config: ConnectionConfig, label: str, rows: float
) -> None:
    wide = {**RUN.model, "hidden_size": 2**16, "seq_length": 2**20}  # terms and parameters vanish
    run = replace(RUN, connection=label, options={"kind": config.kind, **config.to_dict()}, model=wide)
    assert run.config == config
    assert _of(f"{label}, fused", run).total / (2 * 2**16) == pytest.approx(rows, rel=0.01)
    moves = torch_backend(Stream(2**16), config) + enter(Stream(2**16), config) * (1 / 4)
    total = moves.forward.total_bytes(2**19) + moves.backward.total_bytes(2**19)
    [on_torch] = [
        s for s in side_by_side(replace(report_of(parts()), run=run)) if s.label == f"{label}, torch" and s.is_computed
    ]
    assert on_torch.total == pytest.approx(total / 2**19)


def test_full_recompute_runs_forward_again() -> None:
    run = replace(RUN, model={**RUN.model, "recompute_granularity": "full"})
    forward = _of("HC n=2, ideal", RUN).phases["forward"]
    assert _of("HC n=2, ideal", run).phases["recompute"] == forward
    for number, share in ((1, 0.5), (5, 1)):  # of two stages with two layers each
        block = {**run.model, "recompute_method": "block", "recompute_num_layers": number}
        assert _of("HC n=2, ideal", replace(run, model=block)).phases["recompute"] == share * forward


def _of(label: str, run: object) -> StreamBytes:
    report = replace(report_of(parts()), run=run)  # type: ignore[arg-type]
    return next(stream for stream in side_by_side(report) if stream.label == label)
