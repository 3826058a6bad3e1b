"""What a run does when it is told to end, and when its newest checkpoint turns out to be damaged."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_fc.checkpoints.location import TRACKER
from megatron_fc.runs.metrics import read_metrics
from support.damage import SHARD, cut, flip
from support.patience import PATIENCE, wait_for_iteration
from support.training_runs import command, environment, figures, train
from support.training_runs import config as config

ENDLESS = ("train_iters=100000", "lr_decay_iters=100", "save_interval=4", "eval_iters=0")
SHORT = ("train_iters=12", *ENDLESS[1:])


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_all_its_processes_lets_a_run_save_and_end(config: Path, number: signal.Signals) -> None:
    """As SLURM sends it, where a task is all that it has started: Megatron's checkpoint writers among them."""
    run_dir = config.parent / f"told-{number.name}"
    process = subprocess.Popen(
        command(config, f"run_dir={run_dir}", *ENDLESS),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_iteration(run_dir, 6, process)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    name = number.name.removeprefix("SIG")
    assert printed.endswith(f"dfc_x4  ended early: signal {name}\n")
    start, end = events(run_dir)
    assert (start["event"], start["iteration"], start["checkpoint"], start["world_size"]) == ("start", 0, None, 1)
    assert (end["event"], end["reason"], end["iteration"] >= 6) == ("end", f"signal {name}", True)
    assert end["consumed_samples"] == 4 * end["iteration"]
    assert (run_dir / "checkpoints" / TRACKER).read_text() == str(end["iteration"])
    assert (run_dir / "state").read_text() == "continue\n"


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run with checkpoints after 4, 8 and 12 iterations."""
    run_dir = config.parent / "three_checkpoints"
    train(config, run_dir, *SHORT)
    return run_dir


def test_a_run_notes_its_start_and_its_end(finished: Path) -> None:
    start, end = events(finished)
    assert (start["event"], start["consumed_samples"], start["target_samples"]) == ("start", 0, 48)
    assert (end["event"], end["reason"], end["iteration"], end["consumed_samples"]) == ("end", "target", 12, 48)
    assert (finished / "state").read_text() == "done\n"


DAMAGES = {
    "files": lambda folder: cut(folder / "iter_0000012" / SHARD),
    "content": lambda folder: flip(folder / "iter_0000012" / SHARD, 50_000),
    "content, and files of the one before": lambda folder: (
        flip(folder / "iter_0000012" / SHARD, 50_000),
        cut(folder / "iter_0000008" / SHARD),
    ),
    "tracker": lambda folder: (folder / TRACKER).write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_loudly(damage: str, config: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    folder = run_dir / "checkpoints"
    DAMAGES[damage](folder)
    goes_on = {"tracker": 12, "content, and files of the one before": 4}.get(damage, 8)
    printed = train(config, run_dir, *SHORT, "on_damage=previous")["printed"]
    assert "WARNING: " in printed
    assert f"on_damage=previous: this run does, and what came after iter_{goes_on:07d} is trained again" in printed
    start, end = events(run_dir)[2:]
    assert start["checkpoint"] == str(folder / f"iter_{goes_on:07d}")
    assert (start["iteration"], start["consumed_samples"]) == (goes_on, goes_on * 4)
    assert end["reason"] == "target"
    assert (folder / TRACKER).read_text() == "12"
    assert figures(run_dir) == figures(finished)


def test_the_same_command_goes_on_from_the_runs_own_checkpoints(config: Path, finished: Path) -> None:
    """`load`, `ckpt_step` and `finetune` say how it began, and are not applied again."""
    run_dir = config.parent / "fine-tuned"
    began = (f"load={finished / 'checkpoints'}", "ckpt_step=8", "finetune=true", *ENDLESS[1:])
    assert "goes on from" not in train(config, run_dir, *began, "train_iters=4")["printed"]
    printed = train(config, run_dir, *began, "train_iters=8")["printed"]
    own = run_dir / "checkpoints"
    assert f"note: this run goes on from {own}; load={finished / 'checkpoints'} was where it began\n" in printed
    assert f"note: this run goes on from {own}/iter_0000004; finetune=true was for its beginning\n" in printed
    starts = [event for event in events(run_dir) if event["event"] == "start"]
    came_from = [str(finished / "checkpoints/iter_0000008"), str(own / "iter_0000004")]
    assert [start["checkpoint"] for start in starts] == came_from
    assert [(start["iteration"], start["consumed_samples"]) for start in starts] == [(0, 0), (4, 16)]
    losses = read_metrics(run_dir).loss
    assert list(losses) == list(range(1, 9))
    assert losses[5] < losses[1]
