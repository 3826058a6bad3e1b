"""Checkpoints of a run, evaluated one after the other, also while it writes more and deletes old ones."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_fc.checkpoints.changes import stored_args
from megatron_fc.checkpoints.integrity import INDEX, intact_checkpoints, step_of
from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.errors import UserError
from megatron_fc.evaluate.answers import Answers, refuse_other
from megatron_fc.evaluate.engine import Engine, NothingToDo, open_engine
from megatron_fc.evaluate.questions import Questions
from megatron_fc.evaluate.recipes import recipe_without_data
from megatron_fc.evaluate.results import add_results, read_results, results_file
from megatron_fc.runs.writable import refuse_unwritable

_NUMBERS = ("fp8", "fp4", "moe_router_dtype", "moe_router_load_balancing_type")  # settings of how a model computes


@dataclass(frozen=True)
class Evaluation:
    """Which checkpoints are evaluated, how, and where the results go.

    Attributes:
        config: file of the run that wrote the checkpoints.
        overrides: as for training it, of the layout say.
        source: folder of checkpoints, or one of them.
        out: folder of the results.
        every: evaluate the checkpoints of all multiples of this iteration, None for the newest.
        limit: documents of each task, documents or chunks of each set, None for all.
        batch_size: sequences of full length that a replica runs at once, None for the run's micro-batch.
        report: told the results of a checkpoint, on the first rank.
        idle: told there that all results are there already.
    """

    config: Path
    overrides: Sequence[str]
    source: Path
    out: Path
    every: int | None
    limit: int | None
    batch_size: int | None
    report: Callable[[dict[str, Any]], None]
    idle: Callable[[], None]


def evaluate_each(
    asked: Evaluation,
    section: str,
    prepare: Callable[[], None],
    missing: Callable[[dict[str, Any]], list[str]],
    ask: Callable[[Questions, list[str]], dict[str, Any]],
) -> None:
    """Ask checkpoints what their results lack, and add it to these; every rank calls it.

    Args:
        asked: the checkpoints.
        section: of the results.
        prepare: called on the first rank before anything is built.
        missing: given a checkpoint's results, the names that it lacks.
        ask: given what asks a checkpoint's model, and names, what it finds for each.

    Raises:
        UserError: what `prepare` refuses, or the checkpoints cannot be evaluated by this config.
    """
    recipe, out = recipe_without_data(asked.config, asked.overrides), asked.out
    left: list[Path] = []
    asks = False  # this is the first rank

    def lacks(args: Namespace, checkpoint: Path) -> list[str]:
        file = results_file(out, checkpoint)
        results = read_results(file)
        if results:
            refuse_other(file, results.get("model", {}), _model(args, checkpoint))
        return missing(results)

    def choose(args: Namespace) -> Path | None:
        nonlocal asks
        asks = True
        prepare()
        left.extend(path for path in chosen_checkpoints(asked.source, asked.every) if lacks(args, path))
        if left:
            refuse_unwritable(out)
        return left[0] if left else None

    try:
        # The newest one: a run deletes the others.
        newest = chosen_checkpoints(asked.source, asked.every)[-1]
        with open_engine(recipe, newest, asked.batch_size, choose) as engine:
            if not engine.leads:
                engine.follow()
                return
            for number, checkpoint in enumerate(left):
                if number:
                    engine.load(checkpoint)
                model = _model(engine.args, checkpoint)
                answers = Answers(out / "answers" / f"{checkpoint.name}.jsonl", model)
                try:
                    found = ask(Questions(engine, answers), lacks(engine.args, checkpoint))
                finally:
                    answers.close()
                facts = _facts(engine, checkpoint, recipe.label) | {"model": model}
                asked.report(add_results(results_file(out, checkpoint), facts, section, found))
    except NothingToDo:
        if asks:
            asked.idle()


def chosen_checkpoints(source: Path, every: int | None) -> list[Path]:
    """Return the checkpoint that `source` stands for, or all of its complete ones at multiples, from the oldest on.

    Args:
        source: folder of checkpoints, or one of them.
        every: the iterations' divisor, None for the newest checkpoint alone.

    Raises:
        UserError: there is none.
    """
    if every is None:
        return [find_checkpoint(source)]
    found = [path for path in reversed(intact_checkpoints(source)) if step_of(path) % every == 0]
    if not found:
        raise UserError(f"{source} has no complete checkpoint at a multiple of iteration {every}: lower --every")
    return found


def _model(args: Namespace, checkpoint: Path) -> dict[str, Any]:
    """What answers and results depend on; the settings that make another model are the checkpoint's (`load_model`)."""
    return {
        "checkpoint": str(checkpoint.resolve()),
        "written": (checkpoint / INDEX).stat().st_mtime_ns,
        "precision": str(args.params_dtype),
        "seq_length": args.seq_length,
        "tokenizer": args.tokenizer_digest,
        **{name: getattr(args, name) for name in _NUMBERS},
    }


def _facts(engine: Engine, checkpoint: Path, label: str) -> dict[str, Any]:
    """What the results are of."""
    args, stored = engine.args, stored_args(checkpoint)
    return {
        "checkpoint": str(checkpoint),
        "connection": label,
        "iteration": args.iteration,
        # The sequences may be shorter in the evaluation.
        "tokens": args.consumed_train_samples * getattr(stored, "seq_length", args.seq_length),
        "precision": str(args.params_dtype).removeprefix("torch."),
        "lm_eval": version("lm_eval"),
    }
