"""Damaged checkpoints of a real run: one sentence names the file and the checkpoint to use, nothing is touched."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fc.checkpoints.changes import stored_args
from megatron_fc.checkpoints.errors import checkpoint_errors_named
from megatron_fc.checkpoints.integrity import intact_checkpoints, refuse_corrupt, refuse_damaged
from megatron_fc.checkpoints.location import TRACKER, find_checkpoint
from megatron_fc.checkpoints.stored_tensors import is_weight
from megatron_fc.cli.main import main
from megatron_fc.errors import UserError

# The fixture; pytest finds it by its name here.
from support.damage import SHARD, corrupt, cut, flip
from support.megatron_world import parallel_state as parallel_state
from support.training_runs import command, environment, figures, train
from support.training_runs import config as config

WAY_ON = "go on from {folder}/iter_0000004, the newest intact one (train: ckpt_step=4)"
OPTIONS = ("train_iters=8", "lr_decay_iters=8", "save_interval=4", "eval_iters=0")


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run with checkpoints after 4 and 8 iterations."""
    run_dir = config.parent / "with_checkpoints"
    train(config, run_dir, *OPTIONS)
    return run_dir


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoints to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run")) / "checkpoints"


def run(config: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    words = command(config, f"run_dir={run_dir}", *OPTIONS)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / "iter_0000008" / SHARD), "iter_0000008/__0_0.distcp is truncated, it has "),
    "missing shard": (lambda f: (f / "iter_0000008" / SHARD).unlink(), "iter_0000008/__0_0.distcp is missing: "),
    "missing index": (lambda f: (f / "iter_0000008/.metadata").unlink(), "iter_0000008/.metadata is missing: "),
    "damaged index": (lambda f: cut(f / "iter_0000008/.metadata"), "iter_0000008/.metadata is damaged (Unpickling"),
    "damaged format": (
        lambda f: (f / "iter_0000008/metadata.json").write_text(""),
        "iter_0000008/metadata.json is missing or damaged: ",
    ),
    "tracker of nothing": (lambda f: (f / TRACKER).write_text("12"), f"{TRACKER} names iter_0000012, which does not "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_before_anything_starts(
    damage: str, config: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inflict, sentence = DAMAGES[damage]
    inflict(folder)
    if damage == "tracker of nothing":
        shutil.rmtree(folder / "iter_0000008")
    assert_refused(config, folder, sentence, WAY_ON.format(folder=folder), capsys, monkeypatch)


def assert_refused(
    config: Path,
    folder: Path,
    sentence: str,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    assert main(["train", str(config), f"run_dir={folder.parent}", "save_interval=4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-fc: {folder}/{sentence}")
    assert error.endswith(f"{remedy}\n")
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before


def test_checkpoints_without_a_tracker_are_not_overwritten_by_a_new_start(
    config: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = f"go on from {folder}/iter_0000008, the newest intact one (train: ckpt_step=8)"
    (folder / TRACKER).write_text("\n")
    assert_refused(config, folder, f"{TRACKER} holds '', not an ", "write 8 into it", capsys, monkeypatch)
    (folder / TRACKER).unlink()
    assert_refused(config, folder, f"{TRACKER} is missing", newest, capsys, monkeypatch)


def test_without_another_checkpoint_none_is_named(folder: Path) -> None:
    for name in ("iter_0000004", "iter_0000008"):
        cut(folder / name / SHARD)
    with pytest.raises(UserError, match="there is no other intact checkpoint, restore it from a copy or start anew"):
        find_checkpoint(folder)


def refusal(shard: Path, at: int) -> str:
    """What is said of a checkpoint with a flipped bit, "" if it is not noticed."""
    flip(shard, at)
    try:
        refuse_damaged(shard.parent)
        refuse_corrupt(shard.parent)
    except UserError as error:
        return str(error)
    finally:
        flip(shard, at)
    return ""


def test_a_flipped_bit_is_found_wherever_it_is(folder: Path) -> None:
    """torch.load does not notice one in a tensor's values."""
    shard = folder / "iter_0000008" / SHARD
    size = shard.stat().st_size
    found = list(filter(None, (refusal(shard, at) for at in range(1000, size, size // 40))))
    assert all(f"{shard} is corrupt at " in text for text in found)
    assert len(found) > 25, "the rest is padding between records"
    refuse_corrupt(shard.parent)


def test_a_corrupt_optimizer_is_no_matter_where_weights_are_read(folder: Path) -> None:
    checkpoint = folder / "iter_0000008"
    corrupt(checkpoint, "optimizer.")
    refuse_corrupt(checkpoint, of=is_weight)
    with pytest.raises(UserError, match=r" is corrupt at optimizer\."):
        refuse_corrupt(checkpoint)
    corrupt(checkpoint, "optimizer.")
    corrupt(checkpoint, "decoder.")
    with pytest.raises(UserError, match=r" is corrupt at decoder\."):
        refuse_corrupt(checkpoint, of=is_weight)
    corrupt(checkpoint, "decoder.")


def test_what_megatron_cannot_load_is_named(config: Path, folder: Path) -> None:
    """An index that can be read, but has another name for a tensor."""
    index = folder / "iter_0000008/.metadata"
    name = b"decoder.layers.self_attention.k_layernorm.weight"
    index.write_bytes(index.read_bytes().replace(name, name.replace(b"k_", b"j_")))
    done = run(config, folder.parent)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron-fc: Megatron cannot load {index.parent}, KeyError: ")
    assert name.decode() in done.stderr
    assert done.stderr.endswith(f"{WAY_ON.format(folder=folder)}\n")
    assert "Traceback" not in done.stderr
    assert "Traceback" in (folder.parent / "logs/rank0.log").read_text()


def test_a_change_of_config_is_not_taken_for_damage(folder: Path) -> None:
    """What Megatron says of PP2 -> EP2, whatever it is of another layout tomorrow."""
    checkpoint = folder / "iter_0000008"
    args = stored_args(checkpoint)
    assert args is not None
    args.load, args.ckpt_step, args.pipeline_model_parallel_size = str(folder), None, 2

    def load_checkpoint() -> None:
        raise RuntimeError("Expected 2 entries in state dict, but got 4.")

    with pytest.raises(UserError) as said, checkpoint_errors_named(args):
        load_checkpoint()
    assert str(said.value) == (
        f"Megatron cannot load {checkpoint}, RuntimeError: Expected 2 entries in state dict, but got 4.: changed since "
        f"it was written: pipeline_model_parallel_size 1 -> 2; give what it was written with, or begin a run of its "
        f"own, no_load_optim=true load={folder} and another run_dir; if that is not why, "
        f"{WAY_ON.format(folder=folder)}"
    )


@pytest.mark.slow
def test_the_named_checkpoint_goes_on_and_replaces_the_corrupt_one(config: Path, finished: Path, folder: Path) -> None:
    shard = folder / "iter_0000008" / SHARD
    at = next(at for at in range(shard.stat().st_size // 2, shard.stat().st_size) if refusal(shard, at))
    flip(shard, at)
    refused = run(config, folder.parent)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"megatron-fc: {shard} is corrupt at ")
    assert refused.stderr.endswith(f"{WAY_ON.format(folder=folder)}\n")
    assert refused.stderr.count("\n") == 1
    assert (folder / TRACKER).read_text() == "8"

    train(config, folder.parent, *OPTIONS, "ckpt_step=4")
    assert [path.name for path in intact_checkpoints(folder)] == ["iter_0000008", "iter_0000004"]
    refuse_corrupt(folder / "iter_0000008")
    assert figures(folder.parent) == figures(finished)
