"""What a Megatron checkpoint says about its connections, read before anything is built or overwritten."""

import os
import re
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from megatron_fc.checkpoints.integrity import INDEX, intact_checkpoints, refuse_damaged, step_of, way_on
from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.reference import FracParameters
from megatron_fc.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
_WRITING = {"save_checkpoint", "maybe_finalize_async_save"}  # Megatron's functions
_MARK = ".connection."
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
    checkpoint = path if _FOLDER.fullmatch(path.name) and path.is_dir() else latest_checkpoint(path, step)
    if checkpoint is None:
        raise UserError(f"{path} holds no checkpoint: give the folder with {TRACKER}, or an iter_ folder below it")
    refuse_damaged(checkpoint)
    if not (checkpoint / INDEX).exists():
        raise UserError(f"{checkpoint} is no torch_dist checkpoint: convert it with Megatron's --ckpt-convert-format")
    return checkpoint


@contextmanager
def checkpoint_errors_named(args: Namespace) -> Iterator[None]:
    """Turn what Megatron raises while it loads or writes a checkpoint into one sentence; the log has the traceback."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

    try:
        yield
    except (Exception, CheckpointException) as error:
        if isinstance(error, UserError):
            raise
        passed = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        said = cause_of(error)
        if "load_checkpoint" in passed:
            sentence = _cannot_load(args, said)
        elif passed & _WRITING and (failure := _failure_to_write(Path(args.save))):
            sentence = _cannot_write(args, failure)
        else:
            raise
        with suppress(OSError):  # the log may be on the full disk
            traceback.print_exc()
        raise UserError(sentence) from error


def cause_of(error: BaseException) -> str:
    """Say in one line what an error of Megatron's or torch's checkpoint code was."""
    failures = getattr(error, "failures", {})  # of torch's CheckpointException
    causes = [failure[0] for failure in failures.values()]
    cause = causes[0] if causes else error  # not every rank hears of the others' failures
    return shorten(f"{type(cause).__name__}: {cause}", 200)


def _cannot_load(args: Namespace, said: str) -> str:
    checkpoint = latest_checkpoint(Path(args.load), args.ckpt_step)
    assert checkpoint is not None, "Megatron loads it"
    return (
        f"Megatron cannot load {checkpoint}, {said}: give the config of the run that wrote it; if this is that "
        f"config, {way_on(checkpoint)}"
    )


def _failure_to_write(folder: Path) -> OSError | None:
    """What the system says to a write of one MiB: of its writers' errors Megatron keeps no more than the name."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def _cannot_write(args: Namespace, failure: OSError) -> str:
    before = latest_checkpoint(Path(args.save))
    rest = f"it goes on from {before}, which is intact" if before else "no checkpoint was written before"
    return (
        f"Megatron cannot write a checkpoint to {args.save}, {failure.strerror}: repair that, start the same command "
        f"again, {rest}"
    )


def is_frac_key(key: str) -> bool:
    """True for the key of a Frac-Connection's tensor in a checkpoint, its optimizer state included."""
    return _MARK in key and key.rpartition(_MARK)[2] in FracParameters._fields


def stored_structure(checkpoint: Path) -> dict[str, int]:
    """Return the last dimension of each kind of FC tensor in a `torch_dist` checkpoint, {} for a plain one."""
    from megatron.core import dist_checkpointing

    sizes: dict[str, int] = {}
    for key, tensor in dist_checkpointing.load_tensors_metadata(str(checkpoint)).items():
        if is_frac_key(key) and not key.startswith("optimizer."):
            sizes[key.rpartition(_MARK)[2]] = int(tensor.global_shape[-1])
    return sizes


def refuse_other_connection(checkpoint: Path, frac: FracConfig | None, hidden_size: int) -> None:
    """Check that a run's connections are those of the checkpoint it is about to continue.

    Raises:
        UserError: they differ; names both and the way out.
    """
    if not (checkpoint / INDEX).exists():
        return
    stored = stored_structure(checkpoint)
    wanted = _structure(frac, hidden_size) if frac is not None else {}
    if stored != wanted:
        raise UserError(
            f"the checkpoint {checkpoint} has {describe_structure(stored)}, this run has {describe_structure(wanted)}: "
            f"give the run another run_dir, or the connection that it was started with"
        )
    stamped = _stamp(checkpoint)
    if frac is not None and stamped is not None and stamped != frac:
        raise UserError(
            f"the checkpoint {checkpoint} was trained with {stamped}, this run has {frac}: "
            f"give the run another run_dir, or the options that it was started with"
        )


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint was written with its optimizer's state, as far as it says so."""
    from megatron.core import dist_checkpointing

    if checkpoint.name == "release" or not (checkpoint / INDEX).exists():
        return True
    stored: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return not getattr(stored, "no_save_optim", False)


def refuse_missing_optimizer(checkpoint: Path) -> None:
    """Check that a run which goes on with the optimizer's state finds it in a checkpoint.

    Raises:
        UserError: it was written without.
    """
    if not has_optimizer(checkpoint):
        raise UserError(
            f"the checkpoint {checkpoint} holds no optimizer state: set finetune=true to start a run at iteration 0 "
            f"from its weights, or no_load_optim=true to go on from its iteration with a fresh optimizer"
        )


def refuse_existing(target: Path) -> None:
    """Check that a checkpoint can be written to `target`.

    Raises:
        UserError: something is there.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is never overwritten: give a folder that does not exist")


def _stamp(checkpoint: Path) -> FracConfig | None:
    """The options among the arguments that Megatron keeps in a checkpoint; None without `--frac-*` flags."""
    from megatron.core import dist_checkpointing

    from megatron_fc.megatron.flags import stored_frac_config

    args: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return stored_frac_config(args) if args is not None else None


def _structure(frac: FracConfig, hidden_size: int) -> dict[str, int]:
    m, c = frac.rate, frac.fraction_size(hidden_size)
    sizes = {"static_beta": m, "static_gamma": m * m, "static_alpha": m * m}
    if frac.dynamic:
        sizes["dynamic_weight"] = c
        sizes |= {"scale_beta": 1, "scale_alpha": 1} if frac.scale else {}
        sizes |= {"norm_weight": c} if frac.norm != "none" else {}
    return sizes


def describe_structure(sizes: dict[str, int]) -> str:
    """Say in words what `stored_structure` returned."""
    if not sizes:
        return "plain residual connections"
    dynamic = "dynamic_weight" in sizes
    lacks = [what for key, what in (("scale_beta", "scale"), ("norm_weight", "norm")) if dynamic and key not in sizes]
    kind = f"{'dfc' if dynamic else 'sfc'}_x{sizes['static_beta']}"
    return f"{kind} connections" + (f" without {' and '.join(lacks)}" if lacks else "")
