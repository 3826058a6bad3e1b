"""`megatron-fc evaluate`: checkpoints of a run on tasks of the harness."""

import contextlib
import os
from pathlib import Path
from typing import Any

from lm_eval import evaluator

from megatron_fc.evaluate.chosen import Evaluation, evaluate_each
from megatron_fc.evaluate.harness import HarnessModel
from megatron_fc.evaluate.questions import Questions
from megatron_fc.evaluate.results import lacking
from megatron_fc.evaluate.task_list import TaskList, Wanted
from megatron_fc.evaluate.tasks import Tasks
from megatron_fc.training.setup import quiet

# Outside a repository it would say so on the terminal, and no result has it.
evaluator.get_git_commit_hash = lambda: None

# Standard errors of means are exact; of other metrics they are drawn, by as many samples.
_BOOTSTRAP = 100


def evaluate(asked: Evaluation, wanted: TaskList, data: Path | None) -> None:
    """Evaluate checkpoints and write `iter_*.json`; every rank calls it. What is there already is not run again.

    Args:
        asked: the checkpoints.
        wanted: the tasks.
        data: folder of `tasks.fetch`, None to let the harness look for data as it does.

    Raises:
        UserError: a task is unknown, its data are missing, or the checkpoints cannot be evaluated by this config.
    """
    tasks: list[Tasks] = []
    settings: dict[str, dict[str, Any]] = {}

    def prepare() -> None:
        tasks.append(Tasks(wanted, data))
        settings.update({name: _settings(one, name, tasks[0], asked.limit) for name, one in wanted.tasks.items()})

    evaluate_each(
        asked,
        "tasks",
        prepare,
        lambda results: lacking(results, "tasks", settings),
        lambda questions, names: _evaluated(questions, names, tasks[0], wanted, settings),
    )


def _settings(wanted: Wanted, name: str, tasks: Tasks, limit: int | None) -> dict[str, Any]:
    """What a result depends on; whichever metric stands for a task, the file has all of them."""
    metric = {} if wanted.metric is None else {"metric": wanted.metric}
    return {**metric, "shots": tasks.shots(name), "limit": limit, "digest": tasks.digest(name)}


def _evaluated(
    questions: Questions, names: list[str], tasks: Tasks, wanted: TaskList, settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    with quiet(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its many bars and hints
        found: Any = evaluator.simple_evaluate(
            model=HarnessModel(questions),
            tasks=[item for name in names for item in tasks.built[name]],
            limit=settings[names[0]]["limit"],
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            task_manager=tasks.manager,
        )
    return {name: _result(found, name, tasks, wanted.tasks[name], settings[name]) for name in names}


def _result(found: Any, name: str, tasks: Tasks, wanted: Wanted, settings: dict[str, Any]) -> dict[str, Any]:
    """A task's value and all that the harness says of it; of a tag or a group without one the mean of its tasks."""
    leaves = [task.task_name for task in tasks.leaves(name)]
    of_name = found["results"].get(name) or {}
    metrics = _mean([_metrics(found["results"][leaf]) for leaf in leaves]) | _metrics(of_name)
    metric = wanted.metric or next(iter(metrics))
    error = of_name.get(f"{metric}_stderr,none")
    return {
        "metric": metric,
        "value": metrics[metric],
        "stderr": error if isinstance(error, float) else None,  # the harness writes "N/A"
        "documents": sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
        **settings,
        "metrics": metrics,
    }


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """Values by metric, of the first filter that a task has."""
    values: dict[str, float] = {}
    for key, value in results.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            values.setdefault(metric, float(value))
    return values


def _mean(of_tasks: list[dict[str, float]]) -> dict[str, float]:
    shared = [metric for metric in of_tasks[0] if all(metric in metrics for metrics in of_tasks)]
    return {metric: sum(metrics[metric] for metrics in of_tasks) / len(of_tasks) for metric in shared}
