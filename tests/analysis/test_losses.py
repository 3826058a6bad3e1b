"""`megatron-fc analyze losses` on made-up curves: how much earlier, its uncertainty, spikes, other models."""

import math
import random
import statistics
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from torch.utils.tensorboard import SummaryWriter

from megatron_fc.analysis.losses import analyze_losses, earlier, in_words
from megatron_fc.analysis.page import difference_in_words, write_analysis
from megatron_fc.errors import UserError
from megatron_fc.runs.plot import smoothed

STEPS, DECAY = 600, 0.9


def curve(rate: float, seed: int = 1, own: int = 1, noise: float = 0.02, of_batch: float = 0.1) -> dict[int, float]:
    """2 + 3 / (1 + rate t), with the noise of the batches that all runs of a seed read, and some of its own."""
    batches, source = random.Random(seed), random.Random(own)
    return {
        step: 2 + 3 / (1 + rate * step / 100) + batches.gauss(0, of_batch) + source.gauss(0, noise)
        for step in range(1, STEPS + 1)
    }


def test_how_much_earlier_is_found_within_its_uncertainty() -> None:
    held, times = 0, []
    for trial in range(200):
        found = earlier(curve(1.25, trial, 2 * trial), curve(1.0, trial, 2 * trial + 1), DECAY)
        assert found.times is not None
        assert found.high is not None
        assert found.low is None or found.low <= found.times <= found.high
        held += (found.low or 1.0) <= 1.25 <= found.high
        times.append(found.times)
    assert held >= 185
    assert statistics.median(times) == pytest.approx(1.25, abs=0.02)


def test_what_never_gets_there_says_so() -> None:
    found = earlier(curve(0.5, own=2), curve(1.0), DECAY)
    assert (found.times, found.low) == (None, None)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.98])
def test_noise_is_that_of_both_smoothed_curves(decay: float) -> None:
    found = earlier(curve(1.2, 1, 2), curve(1.0, 1, 3), decay)
    of_step = math.hypot(0.02, 0.1)
    assert found.noise == pytest.approx(math.sqrt(2) * of_step * math.sqrt((1 - decay) / (1 + decay)), rel=0.1)


def write_run(folder: Path, losses: dict[int, float], seed: int, connection: str | None, **arguments: object) -> Path:
    """A run's events as Megatron writes them: its arguments as texts, then scalars."""
    writer = SummaryWriter(folder / "tensorboard")
    values: dict[str, object] = {"seed": seed, "num_layers": 4, "seq_length": 32, "global_batch_size": 4}
    values |= {"frac_rate": 4, "frac_dynamic": True} if connection else {}
    for name, value in (values | arguments).items():
        writer.add_text(name, str(value))
    for step, loss in losses.items():
        writer.add_scalar("lm loss", loss, step)
        writer.add_scalar("grad-norm", 0.5 + (5 if step == 300 else 0) + 0.01 * (step % 7), step)
        if connection:
            writer.add_scalar("residual-gain", 1 + step / STEPS, step)
    writer.close()
    return folder


@pytest.fixture
def made_up(tmp_path: Path) -> dict[str, Path]:
    spiked = curve(1.25, 1, 5)
    spiked[400] += 3
    return {
        "base1": write_run(tmp_path / "base1", curve(1.0, 1, 3), 1, None),
        "base2": write_run(tmp_path / "base2", curve(1.0, 2, 4), 2, None),
        "fast1": write_run(tmp_path / "fast1", spiked, 1, "dfc"),
        "fast2": write_run(tmp_path / "fast2", curve(1.25, 2, 6), 2, "dfc"),
        "deep": write_run(tmp_path / "deep", curve(1.0, 1, 7), 1, None, num_layers=8),
        "third": write_run(tmp_path / "third", curve(1.0, 3, 7), 3, None),
    }


def test_runs_are_compared_with_the_baseline_of_their_seed(made_up: dict[str, Path], tmp_path: Path) -> None:
    found = analyze_losses([made_up["fast1"], made_up["fast2"]], [made_up["base1"], made_up["base2"]], DECAY)
    first, second, fast1, fast2 = found["runs"]
    assert (first["baseline"], second["baseline"]) == (None, None)
    assert (fast1["baseline"], fast2["baseline"]) == (str(made_up["base1"]), str(made_up["base2"]))
    assert fast1["loss_spikes"] == [400]
    assert fast2["loss_spikes"] == []
    assert fast1["gradient_spikes"] == [300]
    assert fast1["residual_gain"][-1] == [STEPS, 2]
    ends = [list(smoothed(curve(rate, 2, own), DECAY).values())[-1] for rate, own in ((1.25, 6), (1.0, 4))]
    assert fast2["difference"] == pytest.approx(ends[0] - ends[1], abs=1e-5)
    assert [run["name"] for run in found["runs"]] == ["residual", "residual", "dfc_x4", "dfc_x4"]
    assert in_words(fast2) == f"{fast2['difference']:+.4f}"
    [group] = found["groups"]
    assert group["difference"]["count"] == 2
    assert group["difference"]["mean"] == pytest.approx((fast1["difference"] + fast2["difference"]) / 2)
    write_analysis(tmp_path / "out", "losses", found)
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert f"{fast2['difference']:+.4f}" in page
    assert page.count("data:image/png;base64,") == 2
    assert f"{difference_in_words(group['difference'])}</td>" in page
    # Of runs without connections nothing grows, and no figure of others stays.
    write_analysis(tmp_path / "out", "losses", analyze_losses([made_up["base2"]], [made_up["base1"]], DECAY))
    assert (tmp_path / "out" / "analysis.html").read_text().count("data:image/png;base64,") == 1


def test_the_figure_takes_each_runs_own_baseline(
    made_up: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []
    original = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **k: (drawn.append(list(y)), original(axes, x, y, **k))[1])
    runs = [made_up[name] for name in ("base1", "base2", "fast1", "fast2")]
    found = analyze_losses(runs[2:], runs[:2], DECAY)
    write_analysis(tmp_path / "out", "losses", found)
    ends = [run["difference"] for run in found["runs"][2:]]
    assert [values[-1] for values in drawn[2:12:3]] == pytest.approx([0.0, 0.0, *ends], abs=1e-6)


def test_runs_are_told_apart(made_up: dict[str, Path], tmp_path: Path) -> None:
    """Those of one connection with other settings, of another seed, that break off, and one that is given twice."""
    other = write_run(tmp_path / "slow-seed1", curve(1.1, 1, 8), 1, "dfc", lr=3e-3)
    short = write_run(tmp_path / "short-seed2", dict(list(curve(1.1, 2, 9).items())[:100]), 2, "dfc", lr=1.0)
    runs = [made_up["fast1"], made_up["fast1"], other, short]
    found = analyze_losses(runs, [made_up["base1"], made_up["base2"]], DECAY)
    assert [run["name"] for run in found["runs"][2:]] == ["fast1", "slow", "short"]
    assert [group["name"] for group in found["groups"]] == ["fast1", "slow"]
    assert in_words(found["runs"][-1]).endswith(" at iteration 100, where it ends")
    [_, found] = analyze_losses([made_up["base2"]], [made_up["base1"]], DECAY)["runs"]
    assert in_words(found).endswith(", of another seed, 1")


def test_mistakes_are_one_sentence(made_up: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are runs of different models, num_layers is 8 in the one and 4 in the other"):
        analyze_losses([made_up["deep"]], [made_up["base1"]], DECAY)
    with pytest.raises(UserError, match="third has seed 3, and no baseline has: give one of that seed"):
        analyze_losses([made_up["third"]], [made_up["base1"], made_up["base2"]], DECAY)
    with pytest.raises(UserError, match="has no training curve"):
        analyze_losses([tmp_path], [made_up["base1"]], DECAY)
    with pytest.raises(UserError, match=r"--decay 1.0: give a number from 0 on, below 1"):
        analyze_losses([made_up["fast1"]], [made_up["base1"]], 1.0)
