"""What a run does when it is told to end, and when its newest checkpoint turns out to be damaged."""

import json
import os
import shutil
import signal
import subprocess
import tarfile
from argparse import Namespace
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fc import FracConfig, UserError
from megatron_fc.checkpoints.location import TRACKER
from megatron_fc.checkpoints.start import Start, StartOptions, choose_start
from megatron_fc.runs.metrics import read_metrics
from support.damage import SHARD, cut, flip
from support.patience import PATIENCE, wait_for_iteration
from support.training_runs import command, environment, figures, train
from support.training_runs import config as config

ENDLESS = ("train_iters=100000", "lr_decay_iters=100", "save_interval=4", "eval_iters=0")
SHORT = ("train_iters=12", *ENDLESS[1:])


ARCHIVE = Path(__file__).parent / "data" / "before_the_rooms.tar.xz"  # one checkpoint, of iteration 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "saved", filter="data")
    return tmp_path / "saved"


def chosen(told: list[str], frac: FracConfig | None = None, **given: Any) -> tuple[Start, Namespace]:
    """What is chosen, and the arguments that it was chosen from, which stay as they are."""
    args = {"load": None, "save": None, "ckpt_step": None, "finetune": False, "no_load_optim": False}
    args |= {"frac_from_residual": False, "hidden_size": 8, "global_batch_size": 4, **given}
    options = StartOptions(Path("run"), frac or FracConfig(rate=2), "refuse", told.append)
    namespace = Namespace(**args)
    start = choose_start(namespace, options)
    assert vars(namespace) == args
    return start, namespace


def test_a_start_is_chosen_without_touching_the_arguments(saved: Path, tmp_path: Path) -> None:
    told: list[str] = []
    checkpoint, elsewhere = saved / "iter_0000003", str(tmp_path / "elsewhere")
    newest = Start(saved, checkpoint, iteration=3, consumed_samples=12)
    assert chosen(told)[0] == Start()
    assert chosen(told, load=str(saved))[0] == newest
    assert chosen(told, load=str(saved), ckpt_step=3)[0] == replace(newest, step=3, is_pinned=True)
    anew = chosen(told, load=str(saved), save=elsewhere, finetune=True)[0]
    assert anew == replace(newest, step=None, iteration=0, consumed_samples=0, anew=True)
    assert told == []
    assert chosen(told, load=elsewhere, save=str(saved), ckpt_step=99)[0] == newest
    assert chosen(told, load=str(saved), save=str(saved), finetune=True)[0] == newest
    assert [line.partition(";")[0] for line in told] == [
        f"note: this run goes on from {saved}",
        f"note: this run goes on from {checkpoint}",
    ]
    with pytest.raises(UserError, match="holds no checkpoint: give the folder with"):
        chosen(told, load=elsewhere)
    with pytest.raises(UserError, match="has dfc_x2 connections, this run has dfc_x4 connections"):
        chosen(told, load=str(saved), frac=FracConfig(rate=4))


def test_megatrons_arguments_hear_of_a_start_in_one_place(saved: Path) -> None:
    start, args = chosen([], load=str(saved), ckpt_step=3, save="own", finetune=True)
    with pytest.raises(FrozenInstanceError):
        start.step = 4  # type: ignore[misc]
    replace(start, folder=Path("other"), step=7, anew=False).apply(args)
    assert (args.load, args.ckpt_step, args.finetune, args.save) == ("other", 7, False, "own")


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
