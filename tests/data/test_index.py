"""The order of a run's samples, made before it."""

import subprocess
from pathlib import Path

import pytest

from megatron_fc.training.data_files import OF_A_PREPARED_INDEX
from support.training_runs import command, environment, train
from support.training_runs import config as config

TRUST = [f"{name}=true" for name in OF_A_PREPARED_INDEX]


def index(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = command(config, *overrides)
    words[3:4] = ["data", "index"]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train_iters=4"],
        ["train_samples=16", "train_iters=null", "lr_decay_iters=null", "lr_warmup_iters=null", *TRUST],
    ],
)
def test_a_run_takes_what_was_made_before(config: Path, tmp_path: Path, overrides: list[str]) -> None:
    cache = tmp_path / "cache"
    overrides = [*overrides, f"data_cache_path={cache}", "save_interval=null"]
    done = index(config, *overrides, f"run_dir={tmp_path / 'none'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("train: ")
    assert not (tmp_path / "none").exists()
    made = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert sum(name.endswith("-train-shuffle_index.npy") for name in made) == 1

    train(config, tmp_path / "run", *overrides)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir() if p.suffix != ".checked"} == {
        name: time for name, time in made.items() if not name.endswith(".checked")
    }


def test_there_must_be_a_place_for_it(config: Path) -> None:
    done = index(config, "train_iters=4")
    assert done.returncode == 2
    assert "data_cache_path is not set: name a folder that all nodes of the run see" in done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_takes_it_for_granted_is_refused_without(config: Path, tmp_path: Path, number: int) -> None:
    words = command(config, f"run_dir={tmp_path / 'run'}", f"data_cache_path={tmp_path / 'cache'}", TRUST[number])
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = f"{OF_A_PREPARED_INDEX[number]} wants the order of all samples beforehand, and {tmp_path}/cache/"
    assert said in done.stderr.splitlines()[-1]
