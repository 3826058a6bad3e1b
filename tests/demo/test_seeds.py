"""The differences that the demo is set among are those of the recorded suite."""

import json
from pathlib import Path

import pytest

from megatron_fc.demo.seeds import among_seeds, recorded_differences

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "ablation" / "paper"


def last_losses(variant: str) -> dict[int, float]:
    records = [json.loads(file.read_text()) for file in RECORDS.glob(f"{variant}-seed*.json")]
    return {record["seed"]: record["mean_last_loss"] for record in records if not record["copy"]}


def test_recorded_differences_are_those_of_the_records() -> None:
    residual, connected = last_losses("residual"), last_losses("dfc_x4")
    assert len(connected) > 1
    assert recorded_differences() == pytest.approx({seed: connected[seed] - residual[seed] for seed in connected})


def test_a_difference_is_set_among_them() -> None:
    values = sorted(recorded_differences().values())
    said = among_seeds((values[1] + values[2]) / 2)
    assert f"each by {values[0]:+.4f} to {values[-1]:+.4f}" in said
    assert said.endswith(f"2 of these {len(values)} are below this run's")
