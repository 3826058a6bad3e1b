"""What a run does about losses that cannot be right: two data-parallel ranks, Megatron's own injection of errors."""

import json
import re
from pathlib import Path

import pytest

from megatron_fc.runs.metrics import read_metrics
from support import harness
from support.training_runs import command

# The fixture; pytest finds it by its name here.
from support.training_runs import config as config

pytestmark = pytest.mark.slow

LENGTH = ("train_iters=8", "lr_decay_iters=8", "save_interval=4", "eval_iters=0")
WRONG = r"found (NaN|Inf) in local forward loss calculation on rank [01]"


def train(config: Path, run_dir: Path, *overrides: str, code: int = 0) -> dict:
    """Train to the target, or until both ranks end with a code; returns the last line of starts.jsonl."""
    folder = run_dir.with_name(f"{run_dir.name}-{len(list(run_dir.parent.glob(f'{run_dir.name}-*')))}")
    words = command(config, f"run_dir={run_dir}", *LENGTH, *overrides)[3:]
    assert harness.run("command_line", 2, folder, words) == [code, code]
    return json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])


def test_a_transient_error_may_be_started_again(config: Path, tmp_path: Path) -> None:
    end = train(config, tmp_path / "run", "error_injection_rate=6", code=75)
    number = end["iteration"] + 1  # the step that was wrong is not done
    said = f"iteration {number}: {WRONG}, not when it was repeated: a transient error of the hardware"
    assert re.fullmatch(said, end["reason"]), end["reason"]
    assert train(config, tmp_path / "run")["reason"] == "target"


def test_an_error_that_repeats_is_saved_for_another_device_and_can_be_skipped(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    end = train(config, run_dir, "error_injection_rate=6", "error_injection_type=correct_result", code=16)
    done, tracker = end["iteration"], run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    said = rf"iteration {done + 1}: {WRONG}, also when it was repeated on device cpu of \S+: the next start repeats "
    assert re.match(said, end["reason"]), end["reason"]
    assert tracker.read_text() == str(done)

    again = train(config, run_dir, code=16)
    assert re.search(r"on another device than device cpu of \S+, which this start was given again$", again["reason"])
    assert (again["iteration"], tracker.read_text()) == (done, str(done))

    # As the log says after another device has decided.
    last = train(config, run_dir, f"iterations_to_skip=[{done + 1}]", "rerun_mode=disabled")
    assert (last["reason"], last["iteration"], last["consumed_samples"]) == ("target", 8, 32)
    assert list(read_metrics(run_dir).loss) == [number for number in range(1, 9) if number != done + 1]


def test_a_loss_that_is_nan(config: Path, tmp_path: Path) -> None:
    end = train(config, tmp_path / "run", "lr=1e38", "min_lr=0", "clip_grad=0", code=16)
    assert re.match(
        f"iteration {end['iteration'] + 1}: found NaN in local forward loss calculation on rank [01], also when it was",
        end["reason"],
    )


def test_skipped_iterations_leave_out_their_samples(config: Path, tmp_path: Path) -> None:
    """Without learning, a loss tells which samples it is of."""
    still = ("lr=0", "min_lr=0", "save_interval=null")
    train(config, tmp_path / "all", *still)
    end = train(config, tmp_path / "some", *still, "iterations_to_skip=[3, 5]")
    assert (end["iteration"], end["consumed_samples"]) == (8, 32)
    every = read_metrics(tmp_path / "all").loss
    assert len(set(every.values())) == 8
    assert read_metrics(tmp_path / "some").loss == {n: loss for n, loss in every.items() if n not in (3, 5)}


def test_a_spike_is_a_warning(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    checks = ("check_for_spiky_loss=true", "no_check_for_nan_in_loss_and_grad=true")
    end = train(config, run_dir, *checks, "error_injection_rate=6", "save_interval=null")
    assert end["reason"] == "target"
    assert "(message='Spiky loss')" in "".join(log.read_text() for log in (run_dir / "logs").iterdir())
