"""The run or checkpoint that is analysed, and the recipe of its model."""

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.compress.session import Session, session
from megatron_fc.errors import UserError
from megatron_fc.evaluate.engine import keep_vocabulary
from megatron_fc.runs.summary import read_summary
from megatron_fc.training.config_file import read_sections
from megatron_fc.training.data_files import blends, indexed_files
from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.recipe import Recipe, load_recipe

# The analysis runs batches of its own.
_VALIDATION = ("full_validation=false", "multiple_validation_sets=false", "eval_iters=1", "perturbation=null")
_OF_A_RUN = "from_residual=false"
_UNREAD = ("train_data_path=null", "test_data_path=null")  # where validation data have a name of their own
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


@dataclass(frozen=True)
class Source:
    """What is analysed.

    Attributes:
        checkpoint: its folder.
        recipe: of its model; the layout is free.
        samples: validation sequences that the model is run on.
    """

    checkpoint: Path
    recipe: Recipe
    samples: int


def find_source(path: Path, config: Path | None, overrides: Sequence[str], samples: int) -> Source:
    """Find a checkpoint and its model.

    Args:
        path: folder of a run, of checkpoints, or one of them.
        config: of the run; None takes it from the summary of a finished run.
        overrides: as for training it, of the layout say.
        samples: validation sequences.

    Raises:
        UserError: there is no checkpoint, or no config.
    """
    run_dir = path if (path / "checkpoints").is_dir() else None
    checkpoint = find_checkpoint(path / "checkpoints" if run_dir else path)
    if config is not None:
        return Source(checkpoint, _recipe(config, overrides), samples)
    summary = read_summary(run_dir or checkpoint.parents[1])
    if summary is None:
        raise UserError(f"{run_dir or path} has no summary.json, which would say what was trained: give --config")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({name: values for name, values in summary["config"].items() if values}, file)
        file.flush()
        return Source(checkpoint, _recipe(Path(file.name), overrides), samples)


def _recipe(config: Path, overrides: Sequence[str]) -> Recipe:
    words = [*overrides, *_VALIDATION, _OF_A_RUN]
    sections = read_sections(config, words, megatron_arguments().names())
    if any(values.get("valid_data_path") for values in sections.values()):
        words += _UNREAD
    return load_recipe(config, words)


@contextmanager
def opened(source: Source) -> Iterator[Session]:
    """Load the model on all ranks, with the data of one validation iteration of `samples` or some more."""
    with session(source.recipe, source.checkpoint, partial(_settle, source)) as run:
        args = run.args
        at_once = args.eval_micro_batch_size * args.data_parallel_size
        args.eval_global_batch_size = -(-source.samples // at_once) * at_once
        run.prepare_validation(0)
        yield run


def _settle(source: Source, args: Namespace) -> None:
    for name in _VIRTUAL:
        if (value := getattr(args, name, None)) is not None:
            raise UserError(f"{name}={value}: analysis knows no virtual pipeline stages, set it to null")
    if args.context_parallel_size > 1:
        raise UserError(
            f"context_parallel_size={args.context_parallel_size}: analysis keeps sequences whole, set it to 1"
        )
    _refuse_more_samples(source.samples, args)
    # Batches are made of the samples, for the ranks there are: those of the run say nothing.
    args.global_batch_size = args.eval_global_batch_size = args.rampup_batch_size = None
    keep_vocabulary(source.checkpoint, args)


def _refuse_more_samples(samples: int, args: Namespace) -> None:
    """A sample that is read again says nothing, and all of them are kept in memory."""
    prefixes = [prefix for blend in blends(args) if blend.setting == "valid_data_path" for prefix in blend.prefixes]
    tokens = sum(file.tokens for file in indexed_files(args) if file.prefix in prefixes)
    there = (tokens - 1) // args.seq_length  # each has one token more than its length, which the next begins with
    if prefixes and samples > there:
        raise UserError(
            f"--samples {samples}: the validation data have {there} of {args.seq_length} tokens, give fewer"
        )
