"""Errors of Megatron's while it loads or writes a checkpoint, as one sentence that names the remedy."""

import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

from megatron_fc.callbacks import Callback
from megatron_fc.checkpoints.changes import changes, described, stored_args
from megatron_fc.checkpoints.integrity import way_on
from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.errors import UserError
from megatron_fc.runs.writable import failure_to_write

_WRITING = {"save_checkpoint", "maybe_finalize_async_save"}  # Megatron's functions


class CheckpointErrors(Callback):
    """Names in one sentence what Megatron raises in a run while it loads or writes a checkpoint."""

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def failed(self, error: BaseException) -> BaseException:
        return named(error, self._args)


@contextmanager
def checkpoint_errors_named(args: Namespace) -> Iterator[None]:
    """The same, for what is no run."""
    try:
        yield
    except BaseException as error:
        sentence = named(error, args)
        if sentence is error:
            raise
        raise sentence from error


def named(error: BaseException, args: Namespace) -> BaseException:
    """Return the sentence for what Megatron raised while it loaded or wrote a checkpoint, any other error as it is.

    The log has the traceback.

    Args:
        error: as it was raised, with its traceback.
        args: Megatron's arguments.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

    # Megatron leaves the process where a checkpoint lacks its iteration.
    if isinstance(error, UserError) or not isinstance(error, (Exception, CheckpointException, SystemExit)):
        return error
    passed = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "load_checkpoint" in passed:
        sentence = _cannot_load(args, cause_of(error))
    elif passed & _WRITING and (failure := failure_to_write(Path(args.save))):
        sentence = _cannot_write(args, failure)
    else:
        return error
    with suppress(OSError):  # the log may be on the full disk
        traceback.print_exception(error)
    return UserError(sentence)


def cause_of(error: BaseException) -> str:
    """Say in one line what an error of Megatron's or torch's checkpoint code was."""
    failures = getattr(error, "failures", {})  # of torch's CheckpointException
    causes = [failure[0] for failure in failures.values()]
    cause = causes[0] if causes else error  # not every rank hears of the others' failures
    return shorten(f"{type(cause).__name__}: {cause}", 200)


def _cannot_load(args: Namespace, said: str) -> str:
    checkpoint = latest_checkpoint(Path(args.load), args.ckpt_step)
    assert checkpoint is not None, "Megatron loads it"
    if changed := changes(stored_args(checkpoint), args):
        return (
            f"Megatron cannot load {checkpoint}, {said}: changed since it was written: {described(changed)}; give what "
            f"it was written with, or begin a run of its own, no_load_optim=true load={checkpoint.parent} and another "
            f"run_dir; if that is not why, {way_on(checkpoint)}"
        )
    return (
        f"Megatron cannot load {checkpoint}, {said}: give the config of the run that wrote it; if this is that "
        f"config, {way_on(checkpoint)}"
    )


def _cannot_write(args: Namespace, failure: OSError) -> str:
    before = latest_checkpoint(Path(args.save))
    rest = f"it goes on from {before}, which is intact" if before else "no checkpoint was written before"
    return (
        f"Megatron cannot write a checkpoint to {args.save}, {failure.strerror}: repair that, start the same command "
        f"again, {rest}"
    )
