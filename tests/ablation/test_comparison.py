"""Tables of runs that were never run: known differences, copies, runs that diverged, other data."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes

from megatron_fc.ablation.comparison import compare, noise
from megatron_fc.ablation.report import refuse_other_suite, write_report
from megatron_fc.ablation.suite import Run, Suite, read_suite
from megatron_fc.errors import UserError
from megatron_fc.runs.statistics import interval

SEEDS = [1, 2, 3, 4, 5, 6]
GAIN, OF_SEED, OF_RUN, OF_COPY = -0.05, 0.2, 0.005, 0.001


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    variants = {"residual": {"copies": 4}, "better": {"rate": 4}, "same": {"rate": 2, "seeds": 4}}
    content = {"config": "c.yaml", "seeds": SEEDS, "baseline": "residual", "variants": variants}
    file = tmp_path / "made_up.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_suite(file)


def record(run: Run, loss: float | None, **more: Any) -> dict[str, Any]:
    values = {
        "variant": run.variant,
        "seed": run.seed,
        "copy": run.copy,
        "data": "d",
        "diverged": loss is None,
        "validation_loss": loss,
        "mean_last_loss": None if loss is None else loss + 0.1,
        "iterations": 100,
        "tokens": 5000,
        "tokens_per_second": 100.0 if run.variant == "residual" else 80.0,
        "connection_parameters": 0 if run.variant == "residual" else 44,
        "saved_bytes": 12.0,
        "peak_memory_bytes": 2**20,
        "loss_spikes": 1 if run.variant == "better" else 0,
        "gradient_spikes": 0,
        "median_gradient_norm": 0.5,
        "last_residual_gain": None,
        "machine": {"host": "h", "system": "s"},
        "versions": {"torch": "2"},
        "git_commit": "c",
    }
    return values | more


@pytest.fixture
def records(suite: Suite) -> list[dict[str, Any]]:
    source = random.Random(2)
    of_seed = {seed: source.gauss(5, OF_SEED) for seed in SEEDS}
    made = []
    for run in suite.runs:
        loss = of_seed[run.seed] + (GAIN if run.variant == "better" else 0)
        made.append(record(run, loss + source.gauss(0, OF_COPY if run.copy else OF_RUN)))
    return made


def losses(records: list[dict[str, Any]], variant: str) -> dict[int, float]:
    return {r["seed"]: r["validation_loss"] for r in records if r["variant"] == variant and not r["copy"]}


def test_differences_are_paired_by_seed(suite: Suite, records: list[dict[str, Any]]) -> None:
    base, better, same = compare(suite, records)
    assert (base.validation, base.by_seed) == (None, {})
    before, after = losses(records, "residual"), losses(records, "better")
    assert better.by_seed == {seed: after[seed] - before[seed] for seed in SEEDS}
    assert better.validation == interval([after[seed] - before[seed] for seed in SEEDS])
    assert better.validation.excludes_zero
    assert better.validation.half is not None
    # Less than a tenth of what the seeds differ by: without pairs nothing could be said.
    assert better.validation.half < OF_SEED / 10
    assert abs(better.validation.mean - GAIN) < better.validation.half
    assert better.speed == 0.8
    assert (len(same.by_seed), same.diverged) == (4, 0)


def test_noise_has_three_sources(suite: Suite, records: list[dict[str, Any]]) -> None:
    base, better, _same = noise(suite, records, compare(suite, records))
    assert base.copies == 5
    assert base.of_copies is not None
    assert base.of_seeds is not None
    assert base.of_copies < 0.01 < base.of_seeds
    assert (base.of_differences, base.seeds_needed) == (None, None)
    assert (better.of_copies, better.copies) == (None, 0)
    assert better.seeds_needed is not None
    assert better.seeds_needed <= 5


def test_what_diverged_counts_apart(suite: Suite, records: list[dict[str, Any]]) -> None:
    records = [record(Run("same", 2), None) if (r["variant"], r["seed"]) == ("same", 2) else r for r in records]
    same = compare(suite, records)[2]
    assert (same.diverged, sorted(same.by_seed)) == (1, [1, 3, 4])


def test_baselines_that_lack_and_data_that_differ_are_refused(suite: Suite, records: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="the baseline residual of better has no finished run: run it, or give another"):
        compare(suite, [r for r in records if r["variant"] != "residual"])
    with pytest.raises(UserError, match=r"no run of .* has finished: run `megatron-fc ablate"):
        compare(suite, [])
    other = [r | {"data": "e"} if (r["variant"], r["seed"]) == ("same", 2) else r for r in records]
    with pytest.raises(UserError, match="same and residual of seed 2 read different data"):
        compare(suite, other)


def test_the_report_says_so(suite: Suite, records: list[dict[str, Any]], tmp_path: Path) -> None:
    [machine, text, picture] = write_report(suite, records, tmp_path, "megatron-fc ablate made_up.yaml")
    content = json.loads(machine.read_text())
    better = next(variant for variant in content["variants"] if variant["variant"] == "better")
    lines = text.read_text().splitlines()
    row = next(line for line in lines if line.startswith("| better"))
    mean, half = better["validation"]["mean"], better["validation"]["half"]
    assert f"**{mean:+.4f} ± {half:.4f}**" in row
    assert all(f"{value:+.3f}" in row for value in better["by_seed"].values())
    assert "    megatron-fc ablate made_up.yaml" in lines
    assert any(line.startswith("| better | 80 | 0.80x | 44 | 12 B | 1 MiB | 1.0 | 0.0 | 0.5 |") for line in lines)
    assert row.startswith("| better | residual | 6 |")
    assert f"{len(records)} of {len(suite.runs)} runs on 1 machine" in text.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_that_diverged_or_are_not_there_are_said(
    suite: Suite, records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, said, **k: drawn.append(said))
    for number, of in enumerate(records):
        if of["variant"] == "better":
            records[number] = of | {
                "diverged": True,
                "connection_parameters": None,
                **dict.fromkeys(("validation_loss", "mean_last_loss", "tokens_per_second", "median_gradient_norm")),
            }
    left = [of for of in records if (of["variant"], of["seed"]) != ("same", 1)]
    _, text, _ = write_report(suite, left, tmp_path, "megatron-fc ablate made_up.yaml")
    assert f"{len(suite.runs) - 1} of {len(suite.runs)} runs" in text.read_text()
    assert "| better | residual | 0, 6 diverged |" in text.read_text()
    assert "| same | residual | 3, 1 not there |" in text.read_text()
    assert "| better |  |  |  | 12 B | 1 MiB |  |  |  |  |" in text.read_text()
    assert drawn == ["6 diverged "]


def test_a_folder_of_another_suite_keeps_its_table(suite: Suite, records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report(suite, records, tmp_path, "megatron-fc ablate made_up.yaml")
    refuse_other_suite(tmp_path, suite)
    refuse_other_suite(tmp_path / "none", suite)
    with pytest.raises(UserError, match="holds the table of the suite made_up, not of other: give another --results"):
        refuse_other_suite(tmp_path, replace(suite, file=tmp_path / "other.yaml"))
