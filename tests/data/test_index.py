"""The order of a run's samples, made before it."""

import subprocess
from pathlib import Path

import pytest

from support.training_runs import command, environment, train
from support.training_runs import config as config


def index(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = command(config, *overrides)
    words[3:4] = ["data", "index"]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("length", ["train_iters=4", "train_samples=16"])
def test_a_run_takes_what_was_made_before(config: Path, tmp_path: Path, length: str) -> None:
    cache = tmp_path / "cache"
    overrides = [f"data_cache_path={cache}", length, "save_interval=null"]
    if length.startswith("train_samples"):
        overrides += ["train_iters=null", "lr_decay_iters=null", "lr_warmup_iters=null"]
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
