"""Locations of Megatron's checkpoints: the folder that a path, a tracker or a step stands for."""

import re
from pathlib import Path

from megatron_fc.checkpoints.integrity import INDEX, intact_checkpoints, refuse_damaged, step_of, way_on
from megatron_fc.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_\d+|release")


def latest_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Return the folder of the checkpoint that Megatron loads from `folder`, None where it would rightly begin anew.

    Args:
        folder: `load` of a run.
        step: `ckpt_step`, an iteration to load instead of the newest.

    Raises:
        UserError: the checkpoint is not there, or there are some and nothing says which one is the newest.
    """
    tracker = folder / TRACKER
    name = tracker.read_text(errors="replace").strip() if tracker.exists() else ""
    if tracker.exists() and name != "release" and not name.isdecimal():
        newest = "".join(f"write {step_of(path)} into it" for path in intact_checkpoints(folder)[:1])
        raise UserError(f"{tracker} holds {name!r}, not an iteration: {newest or 'delete it'}")
    if step:
        path, source = folder / f"iter_{step:07d}", f"ckpt_step={step}"
    elif name:
        path, source = folder / (name if name == "release" else f"iter_{int(name):07d}"), str(tracker)
    elif intact_checkpoints(folder):
        raise UserError(f"{tracker} is missing, and without it Megatron would begin anew: {way_on(tracker)}")
    else:
        return None
    if not path.is_dir():
        raise UserError(f"{source} names {path.name}, which does not exist: {way_on(path)}")
    return path


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has written checkpoints to `folder`, be they damaged."""
    return (folder / TRACKER).exists() or bool(intact_checkpoints(folder))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return what the tracker names now, None where it is gone or half written: for a run that writes there."""
    try:
        return folder / f"iter_{int((folder / TRACKER).read_text()):07d}"
    except (OSError, ValueError):
        return None


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return the complete checkpoint that `path` stands for: itself, or one below it as in `latest_checkpoint`.

    Raises:
        UserError: there is none, it is damaged, or it is not in the `torch_dist` format.
    """
    itself = _FOLDER.fullmatch(path.name) and path.is_dir()
    if not itself and not step and not (path / TRACKER).exists() and (there := intact_checkpoints(path)):
        raise UserError(f"{path / TRACKER} is missing, and nothing says which one is meant: give {there[0]} itself")
    checkpoint = path if itself else latest_checkpoint(path, step)
    if checkpoint is None:
        raise UserError(f"{path} holds no checkpoint: give the folder with {TRACKER}, or an iter_ folder below it")
    refuse_damaged(checkpoint)
    if not (checkpoint / INDEX).exists():
        raise UserError(f"{checkpoint} is no torch_dist checkpoint: convert it with Megatron's --ckpt-convert-format")
    return checkpoint


def refuse_existing(target: Path) -> None:
    """Check that a checkpoint can be written to `target`.

    Raises:
        UserError: something is there.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is never overwritten: give a folder that does not exist")
