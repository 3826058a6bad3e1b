"""Which checkpoints of a real run stay."""

import shutil
from pathlib import Path

import pytest

from megatron_fc.checkpoints.integrity import intact_checkpoints, iteration_folders, way_on
from megatron_fc.checkpoints.retention import Retention, kept_checkpoints
from megatron_fc.errors import UserError
from megatron_fc.preflight.disk_space import disk_space_of
from megatron_fc.preflight.nodes import DiskSpace
from megatron_fc.training.recipe import load_recipe
from megatron_fc.training.setup import parse
from support.damage import SHARD, cut
from support.training_runs import config as config
from support.training_runs import train


@pytest.fixture(scope="module")
def kept(config: Path) -> Path:
    """Checkpoints after every second of 12 iterations, of which the last two and each sixth stay."""
    run_dir = config.parent / "kept"
    options = ("train_iters=12", "lr_decay_iters=12", "save_interval=2", "eval_iters=0")
    train(config, run_dir, *options, "keep_last=2", "keep_every=6")
    return run_dir / "checkpoints"


def test_a_run_keeps_its_newest_and_every_kth(kept: Path) -> None:
    assert sorted(path.name for path in kept.glob("iter_*")) == ["iter_0000006", "iter_0000010", "iter_0000012"]


def test_the_only_complete_checkpoints_stay(kept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "copy"))
    rule = Retention(last=1)
    assert rule.superseded(folder, newest=12) == [folder / "iter_0000010", folder / "iter_0000006"]
    assert rule.superseded(folder, newest=10) == [folder / "iter_0000006"], "the twelfth is being written"
    cut(folder / "iter_0000012" / SHARD)
    assert rule.superseded(folder, newest=12) == [folder / "iter_0000006"], "the newest is damaged"
    (folder / "iter_0000010" / ".metadata").unlink()
    assert rule.superseded(folder, newest=12) == []


@pytest.mark.parametrize(
    ("last", "every", "interval", "steps"),
    [(1, None, 2, 9), (3, None, 2, 3), (3, 2, 2, 16), (2, 3, 2, 15), (3, 4, 2, 13), (2, 4, 2, 14), (1, 20, 3, 13)],
)
def test_what_the_disk_must_hold_at_once(
    kept: Path, tmp_path: Path, last: int, every: int | None, interval: int, steps: int
) -> None:
    """One after the other is written, here linked, and what is superseded goes."""
    rule, most = Retention(last, every), 0
    for step in (*range(interval, steps, interval), steps):
        (tmp_path / f"iter_{step:07d}").symlink_to(kept / "iter_0000012")
        most = max(most, len(iteration_folders(tmp_path)))
        for path in rule.superseded(tmp_path, step):
            path.unlink()
    assert sum(kept_checkpoints(rule, steps, interval)) == most


def test_what_the_disk_must_hold_of_a_long_run() -> None:
    assert kept_checkpoints(Retention(3, 25_000), 715_256, 1000) == (4, 28)
    assert sum(kept_checkpoints(Retention(3, 1000), 715_256, 1000)) == 716 == kept_checkpoints(None, 715_256, 1000)[1]


def test_what_is_not_named_by_megatron_is_no_checkpoint(kept: Path, tmp_path: Path) -> None:
    """Copies that people make, in a run's own folder."""
    folder = Path(shutil.copytree(kept, tmp_path / "copy"))
    ours = [folder / f"iter_{number:07d}" for number in (12, 10, 6)]
    for name in ("iter_0000010.bak", "iter_0000010 (copy)", "iter_10", "iter_00000010", "iter_old"):
        shutil.copytree(ours[1], folder / name)
    (folder / "iter_0000008").write_text("a file")
    assert iteration_folders(folder) == intact_checkpoints(folder) == ours
    assert Retention(last=1).superseded(folder, newest=12) == ours[1:]
    assert way_on(ours[0]).startswith(f"go on from {ours[1]}, the newest intact one")
    cut(ours[0] / SHARD)
    assert intact_checkpoints(folder) == ours[1:]


def room(config: Path, run_dir: Path, *overrides: str) -> DiskSpace:
    recipe = load_recipe(config, [f"run_dir={run_dir}", *overrides])
    found = disk_space_of(recipe, parse(recipe))
    assert found is not None
    return found


def test_room_is_asked_for_what_does_not_lie_there_yet(
    config: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    new = room(config, tmp_path / "new", "keep_last=2", "vocab_size=300")
    assert (new.folder, new.checkpoints) == (tmp_path / "new/checkpoints", 3)
    assert room(config, tmp_path / "new").checkpoints == 2

    again = room(config, kept.parent, "keep_last=2")
    written = sum(file.stat().st_size for file in (kept / "iter_0000012").iterdir())
    assert (again.checkpoint_bytes, again.checkpoints) == (written, 1)
    assert room(config, kept.parent, "keep_last=5").checkpoints == 3
    assert new.checkpoint_bytes is not None
    assert 0.5 * written < new.checkpoint_bytes < written, "a tiny model's archives have their share"

    folder = Path(shutil.copytree(kept, tmp_path / "damaged" / "checkpoints"))
    (folder / "iter_0000010" / "of_an_older_release").write_bytes(b"x" * 1000)
    assert room(config, folder.parent).checkpoint_bytes == written, "the newest tells"
    cut(folder / "iter_0000012" / SHARD)
    assert room(config, folder.parent, "keep_last=5").checkpoints == 4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep_last": 0}, "keep_last=0 is no number of checkpoints or iterations"),
        ({"keep_last": True}, "keep_last=True is no number"),
        ({"keep_every": 100}, "keep_every=100 says which checkpoints stay for ever: set keep_last as well"),
        ({"keep_last": 2, "save_retain_interval": 10}, "keep_last and save_retain_interval both delete checkpoints"),
    ],
)
def test_mistakes(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Retention.from_settings(settings)
