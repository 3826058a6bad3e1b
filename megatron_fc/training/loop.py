"""Train a recipe inside Megatron's own loop, `megatron.training.pretrain`."""

import contextlib
import resource
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fc.checkpoints.errors import checkpoint_errors_named
from megatron_fc.checkpoints.integrity import refuse_corrupt
from megatron_fc.checkpoints.location import (
    TRACKER,
    find_checkpoint,
    has_checkpoints,
    latest_checkpoint,
    refuse_existing,
)
from megatron_fc.checkpoints.modelopt_state import has_state, require_modelopt, restore_state, state_in_checkpoints
from megatron_fc.checkpoints.resume import Resumption, progress_in
from megatron_fc.checkpoints.retention import Pruner
from megatron_fc.checkpoints.structure import has_optimizer, refuse_missing_optimizer, refuse_other_connection
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount, count_parameters
from megatron_fc.resilience.hang import Standstill
from megatron_fc.resilience.rank_watch import RankWatch
from megatron_fc.resilience.rejected_results import findings_named
from megatron_fc.resilience.run_record import RunRecord
from megatron_fc.runs.progress import ProgressDisplay
from megatron_fc.runs.rank_log import is_log_rank, real_stdout, run_log
from megatron_fc.training import cpu_lane
from megatron_fc.training.callbacks import Companion
from megatron_fc.training.precision import refuse_unquantizable
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.setup import join_world, model_config, parse

ModelHook = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Trained:
    """What only the training process knows at its end.

    Attributes:
        parameters: of the whole model.
        tokens_per_iteration: global batch size times sequence length.
        peak_memory_bytes: of the rank that needed most: device memory, or resident memory on the CPU lane.
        seconds: wall time of the training call.
        world_size: number of ranks.
    """

    parameters: ParameterCount
    tokens_per_iteration: int
    peak_memory_bytes: int
    seconds: float
    world_size: int


def train(recipe: Recipe, companion: Companion | None = None) -> Trained:
    """Run the recipe to its end; every rank of a launcher calls it, a lone process is a world of one.

    Megatron's output goes to `run_dir/logs`, its figures to `run_dir/tensorboard`, progress to the terminal.

    Args:
        recipe: the run.
        companion: goes along, say to count traffic or to teach.

    Raises:
        UserError: Megatron refuses the arguments, or the checkpoint is not that of this model.
        SystemExit: Megatron ended the run before its target, with code 0 after a signal, 16, 17 or 75 after a result
            that it rejected (`megatron_fc.resilience.rejected_results`).
    """
    companion = companion or Companion()
    start = time.perf_counter()
    join_world()
    args = parse(recipe)
    _refuse_async_save_without_device(args)
    companion.arguments_are_valid(args)
    first_step, checkpoint = _upcycling(args, recipe) if args.frac_from_residual else None, None
    if args.load and first_step is None:  # else it is yet to be written
        first_step, checkpoint = _continuing(args, recipe)
    is_changed = checkpoint is not None and has_state(checkpoint)
    if is_changed:
        require_modelopt(f"the checkpoint {checkpoint}, which is quantised,")
        refuse_unquantizable(args)

    tokens = args.global_batch_size * args.seq_length
    display = ProgressDisplay(real_stdout(), recipe.connection, tokens) if is_log_rank() else None
    record = RunRecord(recipe.run_dir, args)
    standstill = Standstill(args)
    watch = RankWatch(standstill, partial(_when_all_end, args, record, companion))
    pruner = Pruner(recipe.retention, Path(args.save)) if recipe.retention and args.save else None
    hooks: list[ModelHook] = [
        _on_all_ranks(watch.join),
        *([first_step] if first_step else []),
        *([partial(_restore, args)] if is_changed else []),
        _on_all_ranks(partial(_note_start, args, record)),
    ]
    try:
        with (
            run_log(recipe.run_dir, args.rank, display, partial(_after_iteration, pruner)),
            record,
            checkpoint_errors_named(args),
            state_in_checkpoints() if is_changed else contextlib.nullcontext(),
            watch,
            findings_named(args, record.explain),
        ):
            parameters = _pretrain(args, recipe, hooks, record, companion, standstill)
            peak = _peak_memory()
            companion.after_training()
    except SystemExit as end:
        if is_log_rank():
            print(f"{recipe.connection}  ended early: {record.why(end)}", file=real_stdout(), flush=True)
        _leave()
        raise
    if pruner is not None and is_log_rank():
        pruner.finish()
    _leave()
    return Trained(parameters, tokens, peak, time.perf_counter() - start, args.world_size)


def _refuse_async_save_without_device(args: Namespace) -> None:
    if args.async_save and cpu_lane.needed():
        raise UserError(
            "async_save=true, but Megatron's worker for asynchronous checkpoints needs a CUDA device: set "
            "async_save=false and use_persistent_ckpt_worker=false"
        )


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _pretrain(
    args: Namespace,
    recipe: Recipe,
    hooks: list[ModelHook],
    record: RunRecord,
    companion: Companion,
    standstill: Standstill,
) -> ParameterCount:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from megatron_fc.training.batches import datasets

    set_global_variables(args)
    record.listen()
    if args.save and cpu_lane.needed():
        cpu_lane.fork_checkpoint_helper()
    model = model_config(args, recipe)
    counts: list[ParameterCount] = []
    model.pre_wrap_hooks += [
        partial(_count, counts),
        *hooks,
        lambda chunks: companion.model_is_built(args, chunks, counts[0]),
    ]
    step = standstill.count(companion.forward_step)
    pretrain(pretrain_cfg_container_from_args(args, model), datasets, ModelType.encoder_or_decoder, step)
    return counts[0]


def _continuing(args: Namespace, recipe: Recipe) -> tuple[ModelHook | None, Path | None]:
    """Choose the checkpoint that the run goes on from; return what checks its content, and it. None to begin anew.

    Where the run has checkpoints of its own it goes on from them: `load` and `finetune` say how it began.
    """
    if args.save and Path(args.load) != Path(args.save) and has_checkpoints(Path(args.save)):
        _note(f"this run goes on from {args.save}; load={args.load} was where it began")
        args.load, args.ckpt_step = args.save, None
    resumption = Resumption(args, recipe.on_damage, _warn)
    checkpoint = resumption.choose()
    if checkpoint is None:
        if args.load != args.save:  # Megatron would begin anew, which is meant only with a run's own checkpoints
            raise UserError(f"load={args.load} holds no checkpoint: give the folder with {TRACKER}, or drop load")
        return None, None
    refuse_other_connection(checkpoint, recipe.frac, args.hidden_size)
    if args.finetune and args.save and Path(args.load) == Path(args.save) and has_optimizer(checkpoint):
        _note(f"this run goes on from {checkpoint}; finetune=true was for its beginning")
        args.finetune = False
    refuse_missing_optimizer(checkpoint, args)
    return _on_all_ranks(resumption.check_content), checkpoint


def _restore(args: Namespace, chunks: list[Any]) -> list[Any]:
    checkpoint = latest_checkpoint(Path(args.load), args.ckpt_step)
    assert checkpoint is not None, "it was chosen"
    return restore_state(chunks, checkpoint)


def _warn(text: str) -> None:
    _say(f"WARNING: {text}")


def _note(text: str) -> None:
    _say(f"note: {text}")


def _say(text: str) -> None:
    if is_log_rank():
        print(text, file=real_stdout(), flush=True)


def _note_start(args: Namespace, record: RunRecord) -> None:
    checkpoint = latest_checkpoint(Path(args.load), args.ckpt_step) if args.load else None
    record.start(checkpoint, *progress_in(checkpoint, args))


def _on_all_ranks(action: Callable[[], None]) -> ModelHook:
    """Do it when Megatron has joined the ranks, of which only a hook on the model that it then builds hears."""

    def hook(chunks: list[Any]) -> list[Any]:
        action()
        return chunks

    return hook


def _when_all_end(args: Namespace, record: RunRecord, companion: Companion, reason: str, notes: bool) -> str:
    """Note why the ranks end, where `notes` says so; return what to do."""
    if notes:
        record.note(reason)
    if advice := companion.after_a_loss():
        return advice
    if not args.save:
        return "nothing was saved, start anew with save_interval set"
    saved = latest_checkpoint(Path(args.save))
    if saved is None:
        return "nothing was saved yet, start the same command again"
    return f"start the same command again, it goes on from {saved}"


def _upcycling(args: Namespace, recipe: Recipe) -> ModelHook | None:
    """Redirect the run to checkpoints of its own; return what makes the first of them, None if it is there already.

    Megatron runs hooks on the model that it has built before it loads a checkpoint into it.
    """
    from megatron_fc.checkpoints.upcycle import refuse_connected, upcycle

    own = Path(args.save or recipe.run_dir / "checkpoints")
    if recipe.frac is None:
        raise UserError("from_residual with connection=residual: there is nothing to upcycle, set load alone")
    if not args.load or Path(args.load) == own:
        raise UserError("from_residual needs the plain checkpoint to start from: set load to its folder")
    frac, plain, args.load = recipe.frac, Path(args.load), str(own)
    if latest_checkpoint(own) is not None:
        return None
    source = find_checkpoint(plain, args.ckpt_step)
    refuse_connected(source)
    refuse_existing(own)
    is_new_run = not recipe.run_dir.exists()

    def write(chunks: list[Any]) -> list[Any]:
        try:
            refuse_corrupt(source)
            said = upcycle(chunks, source, own, frac, with_optimizer=not (args.no_load_optim or args.finetune))
        except UserError:
            if is_new_run:
                shutil.rmtree(recipe.run_dir, ignore_errors=True)
            raise
        _say(f"from_residual: {said}")
        return chunks

    return write


def _count(counts: list[ParameterCount], chunks: list[Any]) -> list[Any]:
    counts.append(count_parameters(chunks))
    return chunks


def _after_iteration(pruner: Pruner | None) -> None:
    from megatron.training.global_vars import get_tensorboard_writer

    # By itself the writer puts events on disk every two minutes, which a crash would lose.
    if writer := get_tensorboard_writer():
        writer.flush()
    if pruner is not None:
        pruner.look()


def _peak_memory() -> int:
    if cpu_lane.needed():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    peaks = torch.tensor([peak], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    return int(peaks.item())
