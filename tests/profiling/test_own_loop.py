"""`profile_loop`: a training loop that is none of Megatron's, on one rank and on a pipeline of two."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fc import FracConfig, UserError
from megatron_fc.planning.counts import NetworkKey, total_device
from megatron_fc.profiling.files import read_report
from megatron_fc.profiling.own_loop import profile_loop
from support import harness, tiny
from support.layouts import BY_NAME, DHC, ONE_RANK, models_of
from support.megatron_world import parallel_state as parallel_state
from support.ranks import BATCH, MICRO_BATCHES

NUMBERS: dict[str, Any] = {"sequence_length": tiny.SEQUENCE, "micro_batch_size": 2, "global_batch_size": 2}


def test_one_step_is_counted_as_by_hand(tmp_path: Path) -> None:
    model = next(model for model in models_of(ONE_RANK) if model.connection == FracConfig(rate=4))
    [rank] = harness.run("profile_own_loop", 1, tmp_path / "ranks", ONE_RANK, model, tmp_path / "out")
    assert rank.losses == rank.plain_losses
    report = read_report(tmp_path / "out")
    counted, by_hand = total_device(report.device.values()), total_device(rank.device.values())
    assert (counted.read_bytes, counted.written_bytes) == (by_hand.read_bytes, by_hand.written_bytes)
    run = report.run
    assert (run.connection, run.backend, run.layers, run.steps, run.from_step) == ("dfc_x4", "torch", 2, 1, 1)
    assert run.config == FracConfig(rate=4)
    assert run.tokens_per_step == MICRO_BATCHES * BATCH * tiny.SEQUENCE
    assert (run.model["hidden_size"], run.model["transformer_impl"]) == (tiny.WIDTH, "local")
    assert [span.phase for span in report.ranks[0].timeline[0]] == ["forward", "backward"] * MICRO_BATCHES + [
        "optimizer"
    ]
    assert not report.warnings()
    assert {"traffic.json", "traffic.md", "traffic.html"} <= {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_stages_that_exchange_a_wider_stream(tmp_path: Path) -> None:
    layout = BY_NAME["PP2"]
    model = next(model for model in models_of(layout) if model.connection == DHC)
    ranks = harness.run("profile_own_loop", 2, tmp_path / "ranks", layout, model, tmp_path / "out")
    assert [rank.report is None for rank in ranks] == [False, True]
    report = ranks[0].report
    assert (report.run.connection, report.run.model["hidden_size"]) == ("dhc_x4", tiny.WIDTH)
    assert (report.run.layout["pp"], report.run.layout["world_size"], report.missing) == (2, 2, [])
    sends = [rank.network[NetworkKey("optimizer", "pp", "send")].intra_node_bytes for rank in report.ranks]
    assert sends == [4 * MICRO_BATCHES * BATCH * tiny.SEQUENCE * tiny.WIDTH * 4] * 2


def loop(model: torch.nn.Module, out: Path, steps: int, **numbers: int) -> None:
    """So many steps, behind which it fails where none of them is counted to the end."""
    with profile_loop(model, out, **{**NUMBERS, **numbers}) as profile:
        for _ in range(steps):
            profile.step()
            tiny.logits(model, tiny.tokens())
        if numbers.get("from_step") == 0:
            raise ValueError("the loop's own")


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize(
    ("steps", "numbers", "said"),
    [
        (0, {"micro_batch_size": 0}, "micro_batch_size=0: give a number from 1 on"),
        (0, {"from_step": -1}, "from_step=-1: give a number from 0 on"),
        (2, {}, r"the loop ended after 2 steps, before those counted: set from_step or steps lower, and call step\(\)"),
        (1, {"from_step": 0}, "the loop's own"),
    ],
)
def test_mistakes(steps: int, numbers: dict[str, int], said: str, tmp_path: Path) -> None:
    model = tiny.build("dense", FracConfig(rate=4))
    with pytest.raises((UserError, ValueError), match=said):
        loop(model, tmp_path / "out", steps, **numbers)
    assert (tmp_path / "out").exists() == (steps > 0)
    assert not model._forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
