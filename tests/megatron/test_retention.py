"""Which checkpoints of a real run stay."""

import shutil
from pathlib import Path

import pytest
from test_integrity import SHARD, cut
from test_pretrain import config as config
from test_pretrain import train

from megatron_fc.errors import UserError
from megatron_fc.megatron.retention import Retention


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
