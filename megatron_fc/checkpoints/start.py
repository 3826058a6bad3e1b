"""The start of a run: its checkpoint, step and samples, decided once, before Megatron loads anything."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_fc.callbacks import Callback
from megatron_fc.checkpoints.changes import (
    Changes,
    announced,
    changes,
    refuse_changes,
    refuse_other_batch,
    refuse_other_vocabulary,
    stored_args,
)
from megatron_fc.checkpoints.integrity import INDEX, intact_checkpoints, refuse_corrupt, refuse_damaged, step_of
from megatron_fc.checkpoints.location import (
    TRACKER,
    find_checkpoint,
    has_checkpoints,
    latest_checkpoint,
    refuse_existing,
)
from megatron_fc.checkpoints.modelopt_state import refuse_state
from megatron_fc.checkpoints.structure import has_optimizer, refuse_missing_optimizer, refuse_other_connection
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.runs.start_record import read_events

ON_DAMAGE = ("refuse", "previous")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: that Megatron loads from (`load`), None where it loads nothing.
        checkpoint: the one of them that it loads, None to begin anew.
        step: iteration of the checkpoint where that is not the newest (`ckpt_step`).
        is_pinned: the user has set that step, and no other may be taken.
        iteration, consumed_samples: that the run goes on from.
        anew: take the weights of the checkpoint alone (`finetune`).
        fresh_optimizer, fresh_random: leave its optimizer's or its random state (`no_load_optim`, `no_load_rng`).
        given_step: `ckpt_step` as the command has it, be it that it was applied at an earlier start.
        changed: settings that differ from those that the checkpoint was written with.
        plain: checkpoint without connections, of which `checkpoint` is yet to be made.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    step: int | None = None
    is_pinned: bool = False
    iteration: int = 0
    consumed_samples: int = 0
    anew: bool = False
    fresh_optimizer: bool = False
    fresh_random: bool = False
    given_step: int | None = None
    changed: Changes = field(default_factory=dict)
    plain: Path | None = None

    def apply(self, args: Namespace) -> None:
        """Tell Megatron: nothing else changes what its arguments say of the start."""
        args.load = None if self.folder is None else str(self.folder)
        args.ckpt_step, args.finetune = self.step, self.anew
        args.no_load_optim, args.no_load_rng = self.fresh_optimizer, self.fresh_random


@dataclass(frozen=True)
class StartOptions:
    """What a run says of its start beside Megatron's arguments.

    Attributes:
        run_dir: folder of the run.
        connection: of the run, None for plain residuals.
        on_damage: one of ON_DAMAGE.
        tell: told, in a line, of what was chosen.
    """

    run_dir: Path
    connection: ConnectionConfig | None
    on_damage: str
    tell: Callable[[str], None]


def choose_start(args: Namespace, options: StartOptions) -> Start:
    """Choose the checkpoint that a run starts from, by its files; nothing is written.

    Where a run has checkpoints of its own it goes on from them: `load`, `finetune`, `no_load_optim`, `no_load_rng` and
    `ckpt_step` say how it began, or once went on, and are not applied again.

    Args:
        args: Megatron's, validated.
        options: of the run.

    Raises:
        UserError: the checkpoint is damaged, missing, or not that of this run, and no other may be taken.
    """
    _refuse_at_every_start(args)
    if args.from_residual:
        return _upcycling(args, options)
    if not args.load:
        return _as_given(args)
    load, step = Path(args.load), args.ckpt_step
    if args.save and load != Path(args.save) and has_checkpoints(Path(args.save)):
        options.tell(f"note: this run goes on from {args.save}; load={load} was where it began")
        load, step = Path(args.save), None
    start = _chosen(load, step, args, options)
    if start.checkpoint is None and str(load) != args.save:
        # Megatron would begin anew, which is meant only with a run's own checkpoints.
        raise UserError(f"load={load} holds no checkpoint: give the folder with {TRACKER}, or drop load")
    return start


class StartCallback(Callback):
    """Makes a start happen once the ranks are joined: checks the checkpoint's content, or makes it of a plain one.

    Attributes:
        start: as `choose_start` chose it; with `on_damage=previous` an earlier one where its content is corrupt.
    """

    def __init__(self, start: Start, options: StartOptions) -> None:
        self.start = start
        self._options = options
        self._is_new_run = not options.run_dir.exists()

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        if self.start.plain is not None:
            self._upcycle(args, chunks)
        elif self.start.checkpoint is not None:
            self.start = self._with_intact_content(args)
            self.start.apply(args)
        if self.start.checkpoint is not None and not self.start.anew:
            refuse_other_vocabulary(self.start.checkpoint, args)
        return chunks

    def _upcycle(self, args: Namespace, chunks: list[Any]) -> None:
        """Megatron calls it on the model that it has built, before it loads a checkpoint into it."""
        from megatron_fc.checkpoints.upcycle import upcycle

        start, connection, run_dir = self.start, self._options.connection, self._options.run_dir
        assert start.plain is not None
        assert start.folder is not None
        assert connection is not None
        try:
            refuse_corrupt(start.plain)
            with_optimizer = not (start.fresh_optimizer or start.anew)
            said = upcycle(chunks, start.plain, start.folder, connection, with_optimizer=with_optimizer)
        except UserError:
            if self._is_new_run:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise
        self._options.tell(f"from_residual: {said}")

    def _with_intact_content(self, args: Namespace) -> Start:
        """All ranks call it, and come to the same."""
        start, falls_back = self.start, self._options.on_damage == "previous" and not self.start.is_pinned
        while True:
            assert start.checkpoint is not None
            try:
                refuse_corrupt(start.checkpoint)
                break
            except UserError as error:
                assert start.folder is not None
                older = _before(start.folder, start.checkpoint, error, falls_back, self._options.tell)
                start = _start_at(start, older, args)
        is_own = args.save is not None and start.folder == Path(args.save)
        if start.step is not None and (falls_back or (start.is_pinned and is_own)):
            return _as_newest(start)
        return start


def _upcycling(args: Namespace, options: StartOptions) -> Start:
    """Of a run with from_residual: from checkpoints of its own, or from the first of them, made of a plain one."""
    from megatron_fc.checkpoints.upcycle import refuse_connected

    own = Path(args.save or options.run_dir / "checkpoints")
    if options.connection is None:
        raise UserError("from_residual with connection=residual: there is nothing to upcycle, set load alone")
    options.connection.refuse_residual_start()
    if not args.load or Path(args.load) == own:
        raise UserError("from_residual needs the plain checkpoint to start from: set load to its folder")
    if has_checkpoints(own):
        return _chosen(own, None, args, options)
    plain = find_checkpoint(Path(args.load), args.ckpt_step)
    refuse_state(plain, "upcycle the checkpoint that it was made of, and quantise the result")
    refuse_connected(plain)
    refuse_existing(own)
    start = replace(_as_given(args), folder=own, plain=plain)
    found = _start_at(start, plain, args)
    _tell_changes(found, plain, args, options.tell)
    return replace(found, checkpoint=own / plain.name, step=None)


def _refuse_at_every_start(args: Namespace) -> None:
    """Check that nothing is set that would send a run back at every start, past what is checked here."""
    if getattr(args, "override_ckpt_iteration", None) is not None:
        raise UserError(
            f"override_ckpt_iteration={args.override_ckpt_iteration} would hold for every start: set finetune=true "
            f"with load and another run_dir to count from 0, or ckpt_step to go on from an older checkpoint"
        )
    if getattr(args, "pretrained_checkpoint", None):
        raise UserError(
            f"pretrained_checkpoint={args.pretrained_checkpoint} is what load and finetune say: set "
            f"load={args.pretrained_checkpoint} finetune=true"
        )


def _as_given(args: Namespace) -> Start:
    """A start without a checkpoint, with the options of its beginning as the command gives them."""
    return Start(
        anew=args.finetune,
        fresh_optimizer=bool(args.no_load_optim),
        fresh_random=bool(args.no_load_rng),
        given_step=args.ckpt_step,
    )


def _chosen(load: Path, step: int | None, args: Namespace, options: StartOptions) -> Start:
    """The newest checkpoint below `load` whose files are complete, or that of iteration `step`."""
    is_own = args.save is not None and load == Path(args.save)
    if step is not None and is_own and _was_applied(step, options.run_dir):
        options.tell(
            f"note: ckpt_step={step} was applied at an earlier start; to go back once more, write {step} into "
            f"{load / TRACKER}"
        )
        step = None
    checkpoint, newest = None, True
    try:
        checkpoint = latest_checkpoint(load, step)
        if checkpoint is not None:
            refuse_damaged(checkpoint)
    except UserError as error:
        falls_back = options.on_damage == "previous" and step is None
        checkpoint, newest = _before(load, checkpoint, error, falls_back, options.tell), False
    start = replace(_as_given(args), folder=load, step=step, is_pinned=step is not None)
    if checkpoint is None:
        return start
    refuse_other_connection(checkpoint, options.connection, args.hidden_size)
    if is_own:
        start = _going_on(start, checkpoint, options.tell)
    if not (start.anew or start.fresh_optimizer):
        refuse_missing_optimizer(checkpoint)
    found = _start_at(start, checkpoint, args)
    _tell_changes(found, checkpoint, args, options.tell)
    return replace(found, step=step) if newest else found


def _was_applied(step: int, run_dir: Path) -> bool:
    """Whether the last start of a run was given this `ckpt_step`: what came after it is the run's newest."""
    starts = [event for event in read_events(run_dir)[0] if event.get("event") == "start"]
    return bool(starts) and starts[-1].get("ckpt_step") == step


def _going_on(start: Start, checkpoint: Path, tell: Callable[[str], None]) -> Start:
    """The same start from a checkpoint that the run itself has written: with all that this holds."""
    stored = stored_args(checkpoint)
    dropped = []
    if has_optimizer(checkpoint):
        dropped += ["finetune"] * start.anew + ["no_load_optim"] * start.fresh_optimizer
        start = replace(start, anew=False, fresh_optimizer=False)
    if not getattr(stored, "no_save_rng", False) and not start.anew:
        dropped += ["no_load_rng"] * start.fresh_random
        start = replace(start, fresh_random=False)
    if dropped:
        named = " and ".join(f"{name}=true" for name in dropped)
        tell(f"note: this run goes on from {checkpoint}; {named} was for its beginning")
    return start


def _tell_changes(start: Start, checkpoint: Path, args: Namespace, tell: Callable[[str], None]) -> None:
    """Refuse, or announce, what the run changes of a checkpoint's settings; one that begins anew may change all."""
    if start.anew:
        return
    refuse_changes(checkpoint, start.changed, fresh_optimizer=start.fresh_optimizer)
    refuse_other_batch(checkpoint, start.changed, args)
    for line in announced(checkpoint, start.changed):
        tell(line)
    if start.fresh_optimizer:
        tell(f"note: the optimizer of {checkpoint} is left: its state is new, and the learning rate warms up again")


def _before(
    folder: Path, damaged: Path | None, error: UserError, falls_back: bool, tell: Callable[[str], None]
) -> Path:
    """The newest intact checkpoint before a damaged one, or of all if it is the tracker that is damaged."""
    intact = intact_checkpoints(folder) if falls_back else []
    older = [path for path in intact if damaged is None or step_of(path) < step_of(damaged)]
    if not older:
        raise error
    tell(f"WARNING: {error}; on_damage=previous: this run does, and what came after {older[0].name} is trained again")
    return older[0]


def _as_newest(start: Start) -> Start:
    """Let the tracker name it: Megatron reads the tracker in any case, and the next start is to find it at once."""
    assert start.folder is not None
    if torch.distributed.get_rank() == 0:
        (start.folder / TRACKER).write_text(str(start.step))
    torch.distributed.barrier()
    return replace(start, step=None)


def _start_at(start: Start, checkpoint: Path, args: Namespace) -> Start:
    """The same start at one checkpoint of its folder, with the iteration and samples that Megatron goes on from."""
    from megatron.core import dist_checkpointing

    if checkpoint.name == "release":
        return replace(start, checkpoint=checkpoint)
    start = replace(start, checkpoint=checkpoint, step=step_of(checkpoint))
    if start.anew:
        return start
    if not (checkpoint / INDEX).exists():  # an older format
        samples = step_of(checkpoint) * args.global_batch_size
        return replace(start, iteration=step_of(checkpoint), consumed_samples=samples)
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    samples = int(common["args"].consumed_train_samples)
    changed = changes(common["args"], args)
    return replace(start, iteration=int(common["iteration"]), consumed_samples=samples, changed=changed)
