"""`megatron-fc quantize`: post-training quantisation of a checkpoint, calibrated on the run's own validation data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_fc.checkpoints.location import find_checkpoint, refuse_existing
from megatron_fc.checkpoints.modelopt_state import (
    enabled_quantizers,
    refuse_quantized_connections,
    refuse_state,
    require_modelopt,
    state_in_checkpoints,
)
from megatron_fc.compress.recipes import quantization_config, refuse_unavailable
from megatron_fc.compress.session import Session, session
from megatron_fc.errors import UserError
from megatron_fc.runs.rank_log import is_log_rank, real_stdout
from megatron_fc.training.precision import refuse_unquantizable
from megatron_fc.training.recipe import Recipe


@dataclass(frozen=True)
class Quantized:
    """What came of it.

    Attributes:
        original_loss: validation loss before; NaN on ranks without the last pipeline stage.
        loss: and with fake quantisation, on the same batches.
        quantizers: number of tensors that are quantised on this rank.
    """

    original_loss: float
    loss: float
    quantizers: int


def quantize(recipe: Recipe, source: Path, target: Path, name: str, calibration_iters: int) -> Quantized:
    """Write the checkpoint below `source`, quantised, to the folder `target`; every rank calls it.

    The weights stay in the model's precision: what is added are the quantizers with their scales, so that training
    goes on from there (quantisation-aware training) and the loss is that of the quantised model.

    Args:
        recipe: the run that the checkpoint belongs to.
        source: folder of checkpoints, or one of them.
        target: folder that does not exist.
        name: one of `recipes.RECIPES`.
        calibration_iters: validation iterations whose activations set the scales; the losses are those of the
            `eval_iters` iterations behind them.

    Raises:
        UserError: ModelOpt is missing, the machine cannot compute the recipe, the checkpoint is quantised already,
            damaged or of another model, or the target exists.
    """
    require_modelopt("megatron-fc quantize")
    refuse_unavailable(name)
    if calibration_iters < 1:
        raise UserError(f"--calibration-iters {calibration_iters}: the scales need at least one iteration")
    checkpoint = find_checkpoint(source)
    refuse_state(checkpoint, "quantise the checkpoint that it was made of")
    refuse_existing(target)
    with session(recipe, checkpoint, refuse_unquantizable) as run:
        import modelopt.torch.quantization as mtq

        losses = run.prepare_validation(calibration_iters)

        def calibrate(_: object) -> None:
            _validate(run, "calibration", 0, calibration_iters)

        original = _validate(run, "original", calibration_iters, losses)
        mtq.quantize(run.model, quantization_config(name), calibrate)
        refuse_quantized_connections(run.model)
        loss = _validate(run, name, calibration_iters, losses)
        with state_in_checkpoints():
            run.save(target)
        return Quantized(original, loss, len(enabled_quantizers(run.model)))


def _validate(run: Session, title: str, start: int, iterations: int) -> float:
    with _progress_bar(title, iterations * run.micro_batches) as step:
        return run.validate(start, iterations, step)


@contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over micro-batches on the logging rank's terminal; nothing where there is none."""
    from rich.console import Console
    from rich.progress import Progress

    if not is_log_rank():
        yield lambda: None
        return
    console = Console(file=real_stdout(), highlight=False)
    with Progress(console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
