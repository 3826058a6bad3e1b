"""Train a recipe inside Megatron's own loop, `megatron.training.pretrain`."""

import resource
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fc.callbacks import Callback, Callbacks
from megatron_fc.checkpoints.errors import CheckpointErrors
from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.checkpoints.modelopt_state import ModelOptState, has_state
from megatron_fc.checkpoints.retention import Pruner
from megatron_fc.checkpoints.start import Start, StartCallback, StartOptions, choose_start
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount, count_parameters
from megatron_fc.resilience.checkpoint_worker import CheckpointWorker
from megatron_fc.resilience.hang import StepClock
from megatron_fc.resilience.helpers import bind_helpers
from megatron_fc.resilience.rank_watch import RankWatch
from megatron_fc.resilience.rejected_results import RejectedResults
from megatron_fc.resilience.run_lock import run_lock
from megatron_fc.resilience.run_record import RunRecord
from megatron_fc.runs.progress import ProgressDisplay
from megatron_fc.runs.rank_log import is_log_rank, real_stdout, run_log
from megatron_fc.runs.writable import failure_to_write
from megatron_fc.training import cpu_lane
from megatron_fc.training.events import EventsOnDisk, outlive_full_disk
from megatron_fc.training.exact_resume import exact_resume
from megatron_fc.training.hub_tokenizer import refuse_tokenizer_out_of_reach
from megatron_fc.training.perturbation import Perturbation
from megatron_fc.training.precision import refuse_unquantizable
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.refusal import Refusals
from megatron_fc.training.rehearsal import rehearse
from megatron_fc.training.residual_gain import ResidualGain
from megatron_fc.training.setup import join_world, model_config, parse, written_folders
from megatron_fc.training.steps import Steps
from megatron_fc.training.token_data import TokenErrors
from megatron_fc.training.tokenizer_digest import tokenizer_digest
from megatron_fc.training.vocabulary import unread_vocabulary

_INTERRUPTED = 130  # a shell's code for Ctrl-C


@dataclass(frozen=True)
class Trained:
    """What only the training process knows at its end.

    Attributes:
        parameters: of the whole model.
        tokens: trained in all, those of earlier starts included.
        tokens_per_iteration: global batch size times sequence length.
        peak_memory_bytes: of the rank that needed most: device memory, or resident memory on the CPU lane.
        seconds: wall time of the training call.
        world_size: number of ranks.
    """

    parameters: ParameterCount
    tokens: int
    tokens_per_iteration: int
    peak_memory_bytes: int
    seconds: float
    world_size: int


def train(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> Trained:
    """Run the recipe to its end; every rank of a launcher calls it, a lone process is a world of one.

    Megatron's output goes to `run_dir/logs`, its figures to `run_dir/tensorboard`, progress to the terminal.

    Args:
        recipe: the run.
        callbacks: go along, say to teach, or to count traffic; the run's own come before them.

    Raises:
        UserError: Megatron refuses the arguments, or the checkpoint is not that of this model.
        SystemExit: Megatron ended the run before its target, with code 0 after a signal, 16, 17 or 75 after a result
            that it rejected (`megatron_fc.resilience.rejected_results`).
    """
    began = time.perf_counter()
    join_world()
    bind_helpers()
    args = parse(recipe)
    rehearse(args, recipe)
    refuse_tokenizer_out_of_reach(args)
    options = StartOptions(recipe.run_dir, recipe.connection, recipe.on_damage, _say)
    start = choose_start(args, options)
    start.apply(args)
    starting = StartCallback(start, options)
    record = RunRecord(recipe.run_dir, args, starting)
    if args.save and cpu_lane.needed():
        with record.signals_held():
            cpu_lane.fork_checkpoint_helper()
    every = Callbacks([*_own(args, recipe, start, starting, record, callbacks), *callbacks])
    every.arguments_valid(args)
    _refuse_unwritable_folders(args, recipe.run_dir)

    tokens = args.global_batch_size * args.seq_length
    display = ProgressDisplay(real_stdout(), recipe.label, tokens) if is_log_rank() else None
    steps = Steps(args, every)
    try:
        with run_log(recipe.run_dir, args.rank, display, steps.over):
            try:
                with run_lock(recipe.run_dir):
                    parameters = _pretrain(args, recipe, record, steps, every)
                    peak = _peak_memory()
                    steps.end()
                    every.end()
            except BaseException as error:
                named = every.failed(error)
                if named is error:
                    raise
                raise named from error
    except KeyboardInterrupt as interrupt:
        if not is_log_rank():
            raise SystemExit(_INTERRUPTED) from interrupt
        advice = _when_all_end(args, record, Callbacks(callbacks), "", notes=False)
        raise KeyboardInterrupt(f"interrupted: {advice}") from interrupt
    except SystemExit as end:
        _say(f"{recipe.label}  ended early: {record.why(end)}")
        _leave()
        raise
    _leave()
    done = args.consumed_train_samples * args.seq_length
    return Trained(parameters, done, tokens, peak, time.perf_counter() - began, args.world_size)


def _own(
    args: Namespace,
    recipe: Recipe,
    start: Start,
    starting: StartCallback,
    record: RunRecord,
    given: Sequence[Callback],
) -> list[Callback]:
    """The callbacks of every run. An error passes them in this order, the end of the run in the reverse one."""
    own: list[Callback] = []
    if recipe.retention and args.save:
        own.append(Pruner(recipe.retention, Path(args.save)))
    if recipe.perturbation is not None:
        own.append(Perturbation(recipe.perturbation))
    if recipe.log_residual_gain:
        own.append(ResidualGain())
    own += [RejectedResults(args, record.explain), starting]
    if start.checkpoint is not None and start.plain is None and has_state(start.checkpoint):
        refuse_unquantizable(args)
        own.append(ModelOptState(lambda: starting.start.checkpoint))
    # The watch hears of errors in their last words.
    worker = CheckpointWorker(args)
    on_end = partial(_when_all_end, args, record, Callbacks(given))
    watch = RankWatch(StepClock(args), f"run_dir={recipe.run_dir}", on_end, worker.lost)
    return [*own, CheckpointErrors(args), Refusals(), TokenErrors(), watch, record, EventsOnDisk(), worker]


def _refuse_unwritable_folders(args: Namespace, run_dir: Path) -> None:
    for folder, setting in written_folders(args, run_dir).items():
        if failure := failure_to_write(folder, size=0):
            raise UserError(f"{setting}={folder} cannot be written, {failure.strerror}: choose another")


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _pretrain(args: Namespace, recipe: Recipe, record: RunRecord, steps: Steps, every: Callback) -> ParameterCount:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import get_tokenizer, set_global_variables

    from megatron_fc.training.batches import datasets, forward_step

    set_global_variables(args)
    outlive_full_disk()
    args.tokenizer_digest = tokenizer_digest(args, get_tokenizer())
    if said := unread_vocabulary(args, get_tokenizer()):
        _say(f"note: {said}")
    record.listen()
    model = model_config(args, recipe)
    counts: list[ParameterCount] = []

    def built(chunks: list[Any]) -> list[Any]:
        counts.append(count_parameters(chunks))
        return every.model_built(args, chunks, counts[0])

    model.pre_wrap_hooks.append(built)
    step = steps.around_forward_step(forward_step)
    with exact_resume(args):
        pretrain(pretrain_cfg_container_from_args(args, model), datasets, ModelType.encoder_or_decoder, step)
    return counts[0]


def _say(text: str) -> None:
    if is_log_rank():
        print(text, file=real_stdout(), flush=True)


def _when_all_end(args: Namespace, record: RunRecord, given: Callback, reason: str, notes: bool) -> str:
    """Note why the ranks end, where `notes` says so; return what to do."""
    if notes:
        record.note(reason)
    if advice := given.advice():
        return advice
    if not args.save:
        return "nothing was saved, start anew with save_interval set"
    saved = latest_checkpoint(Path(args.save))
    if saved is None:
        return "nothing was saved yet, start the same command again"
    return f"start the same command again, it goes on from {saved}"


def _peak_memory() -> int:
    if cpu_lane.needed():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    peaks = torch.tensor([peak], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    return int(peaks.item())
