"""What a run shows and leaves behind, on lines and events as Megatron writes them."""

import io
import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_fc.cli.main import main
from megatron_fc.runs.log_lines import parse_iteration, parse_validation
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.runs.plot import plot_losses, smoothed, told_apart
from megatron_fc.runs.progress import ProgressDisplay
from megatron_fc.runs.rank_log import run_log
from megatron_fc.runs.summary import read_summary, write_summary

# Copied from a log of megatron-core 0.19.2.
ITERATION = (
    " [2026-11-24 03:05:29.027146] iteration        2/      10 | consumed samples:           16 | elapsed time per "
    "iteration (ms): 6053.4 | learning rate: 2.000000E-04 | global batch size:     8 | lm loss: 8.362732E+00 | "
    "load_balancing_loss: 1.028519E+00 | z_loss: 7.936013E+00 | loss scale: 1.0 | grad norm: 2.968 | number of "
    "skipped iterations:   0 | number of nan iterations:   0 |"
)
VALIDATION = (
    " validation loss at iteration 10 on validation set | lm loss value: 7.633497E+00 | lm loss PPL: 2.066264E+03 | "
)


def test_iteration_line() -> None:
    record = parse_iteration(ITERATION)
    assert record is not None
    assert (record["iteration"], record["iterations"]) == (2, 10)
    assert (record["loss"], record["step_ms"]) == (8.362732, 6053.4)
    assert (record["consumed_samples"], record["grad_norm"], record["load_balancing_loss"]) == (16, 2.968, 1.028519)


def test_validation_lines() -> None:
    assert parse_validation(VALIDATION) == {"iteration": 10, "set": "validation", "loss": 7.633497}
    assert parse_validation(VALIDATION.replace("validation set", "test set"))["set"] == "test"  # type: ignore[index]
    during = VALIDATION.replace(" on validation set", "")
    assert parse_validation(during) == {"iteration": 10, "set": "validation", "loss": 7.633497}


@pytest.mark.parametrize("line", ["", "Evaluating iter 7/8", "saving checkpoint at iteration      10 to runs", "| |"])
def test_other_lines(line: str) -> None:
    assert parse_iteration(line) is None
    assert parse_validation(line) is None


def log_events(
    run_dir: Path, losses: dict[int, float], validation: list[float] = (), suffix: str = "a", test_set: bool = False
) -> None:  # type: ignore[assignment]
    with SummaryWriter(str(run_dir / "tensorboard"), filename_suffix=f".{suffix}") as writer:
        writer.add_text("do_test", str(int(test_set)), 0)
        for step, loss in losses.items():
            writer.add_scalar("lm loss", loss, step)
            writer.add_scalar("iteration-time", 0.5, step)
        for value in validation:
            writer.add_scalar("lm loss validation", value, max(losses))


def test_resumed_run_counts_repeated_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))  # the files are named and ordered by the second
    log_events(tmp_path, {1: 5.0, 2: 4.0, 3: 3.5}, suffix="first")
    log_events(tmp_path, {3: 3.0, 4: 2.0}, [2.25, 2.5, 2.75], suffix="second", test_set=True)
    metrics = read_metrics(tmp_path)
    assert metrics.loss == {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}
    assert metrics.validation == {4: 2.5}
    assert metrics.test == {4: 2.75}


def test_the_later_of_two_validations_counts_and_is_no_test(tmp_path: Path) -> None:
    """Megatron validates after a step of `eval_interval`, and at the end again, on the batches that follow."""
    log_events(tmp_path, {1: 5.0, 2: 4.0}, [2.5, 2.25])
    metrics = read_metrics(tmp_path)
    assert metrics.validation == {2: 2.25}
    assert metrics.test == {}


def test_no_run_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path).loss == {}
    assert read_summary(tmp_path) is None


def finished_run(run_dir: Path, connection: str, loss: float) -> Path:
    log_events(run_dir, {step: loss + 1 / step for step in range(1, 31)}, [loss])
    facts = {"connection": connection, "tokens_per_iteration": 100, "parameters": 1000, "connection_parameters": 0}
    write_summary(run_dir, {**facts, "tokens": 3000, "peak_memory_bytes": 2**20})
    return run_dir


def test_summary_compare_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    residual = finished_run(tmp_path / "residual", "residual", 3.0)
    frac = finished_run(tmp_path / "dfc_x4", "dfc_x4", 2.5)
    summary = json.loads((frac / "summary.json").read_text())
    assert summary["tokens_per_second"] == 200.0
    assert summary["iterations"] == 30
    assert summary["tokens"] == 3000
    assert summary["validation_loss"] == 2.5
    assert summary["versions"]["torch"].startswith("2.")

    png = tmp_path / "plots" / "losses.png"
    assert main(["compare", str(residual), str(frac), "--plot", str(png)]) == 0
    printed = capsys.readouterr().out
    assert "2.5000 (-0.5000)" in printed
    assert "200 (1.00x)" in printed
    assert png.read_bytes().startswith(b"\x89PNG")


def test_compare_refuses_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "has no summary.json: give the folder of a run that has finished" in capsys.readouterr().err


def test_smoothing_is_unbiased_at_the_start() -> None:
    assert smoothed({1: 4.0, 2: 4.0, 3: 4.0}, 0.9) == pytest.approx({1: 4.0, 2: 4.0, 3: 4.0})
    assert smoothed({1: 0.0, 2: 1.0}, 0.5)[2] == pytest.approx(2 / 3)


def test_plot_of_runs_of_different_length(tmp_path: Path) -> None:
    log_events(tmp_path / "a", {1: 3.0, 2: 2.0})
    log_events(tmp_path / "b", {2: 2.0, 3: 1.0})
    assert plot_losses([("a", tmp_path / "a"), ("b", tmp_path / "b")], tmp_path / "x.png").exists()


def test_log_keeps_everything_and_the_display_what_matters(tmp_path: Path) -> None:
    shown, over = io.StringIO(), []
    display = ProgressDisplay(shown, "dfc_x4", tokens_per_iteration=2048)
    with run_log(tmp_path, 3, display, over.append) as path:
        print("building model ...")
        print(ITERATION)
        print(VALIDATION)
    assert path == tmp_path / "logs" / "rank3.log"
    assert path.read_text() == f"building model ...\n{ITERATION}\n{VALIDATION}\n"
    assert shown.getvalue().splitlines() == [
        "dfc_x4  iteration 2/10  loss 8.3627  338 tokens/s  0:48 left",
        "dfc_x4  iteration 10  validation loss 7.6335",
    ]
    assert over == [2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal_leaves_the_log_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    display = ProgressDisplay(terminal, "dfc_x4", tokens_per_iteration=2048)
    with run_log(tmp_path, 0, display, lambda _: None) as path:
        for _ in range(3):
            print(ITERATION)
        print(VALIDATION)
    assert path.read_text() == f"{ITERATION}\n" * 3 + f"{VALIDATION}\n"
    assert "consumed samples" not in terminal.getvalue()
    assert "2/10" in terminal.getvalue()
    assert "validation loss 7.6335" in terminal.getvalue()


def test_spikes_and_the_growth_of_the_residual_gain_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {step: 5 - 0.01 * step + 0.02 * (step % 3) for step in range(1, 61)}
    for name, spike in (("calm", 0.0), ("spiky", 4.0)):
        log_events(tmp_path / name, losses | {50: losses[50] + spike}, suffix=name)
        with SummaryWriter(str(tmp_path / name / "tensorboard"), filename_suffix=".more") as writer:
            for step in losses:
                writer.add_scalar("grad-norm", 0.5 + 0.01 * (step % 7), step)
                writer.add_scalar("residual-gain", 1 + step / 60, step)
        facts = {"connection": name, "tokens_per_iteration": 8}
        summary = write_summary(tmp_path / name, facts)
        assert (summary["loss_spikes"], summary["gradient_spikes"]) == (int(spike > 0), 0)
        assert summary["median_gradient_norm"] == pytest.approx(0.53)
        assert summary["last_residual_gain"] == 2
    assert main(["compare", *(str(tmp_path / name) for name in ("calm", "spiky"))]) == 0
    printed = capsys.readouterr().out
    assert "loss spikes" in printed
    assert "spikes of the gradient norm" not in printed
    assert "largest residual gain, last" in printed


def test_runs_of_one_connection_are_told_apart_by_their_folders() -> None:
    folders = [Path("runs/plain"), Path("runs/a"), Path("runs/b")]
    assert told_apart(["residual", "dfc_x4", "dfc_x4"], folders) == ["residual", "dfc_x4 (a)", "dfc_x4 (b)"]
