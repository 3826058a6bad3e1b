"""Tasks that are evaluated, by which metric and with how many examples before the question: names, or a file of them.

tasks:
  hellaswag: {metric: acc_norm, shots: 0}
averages:
  mmlu_var: {mmlu_stem_var: 0.215, ...}       weights
paper:
  residual: {hellaswag: 0.7428, ...}          numbers to stand beside
folder: tasks                                  of tasks in the harness's YAML format, beside the file
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_fc.errors import UserError, unknown
from megatron_fc.training.strict_yaml import StrictLoader

_SECTIONS = ("tasks", "averages", "paper", "folder", "perplexity")


@dataclass(frozen=True)
class Wanted:
    """One task.

    Attributes:
        metric: that stands for it, None for the first that the task has.
        shots: examples before the question, None for what the task says.
    """

    metric: str | None = None
    shots: int | None = None


@dataclass
class TaskList:
    """Several tasks.

    Attributes:
        tasks: by the harness's names, of groups too.
        averages: by name, the weights of tasks and of averages before it.
        paper: by the name of a column, published values of tasks and averages.
        folders: of tasks that the harness does not have.
        perplexity: names of validation sets.
    """

    tasks: dict[str, Wanted] = field(default_factory=dict)
    averages: dict[str, dict[str, float]] = field(default_factory=dict)
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    perplexity: list[str] = field(default_factory=list)


def read_task_list(words: Sequence[str], folders: Sequence[Path] = ()) -> TaskList:
    """Read what `--tasks` says.

    Args:
        words: names of tasks, or YAML files of this module's form.
        folders: of tasks that the harness does not have.

    Raises:
        UserError: a file cannot be read, or says what nobody knows.
    """
    found = TaskList(folders=list(folders))
    for word in words:
        if not word.endswith((".yaml", ".yml")):
            _refuse_no_name(word)
            _add(found.tasks, word, Wanted())
            continue
        path = Path(word)
        content = _content(path)
        for name, values in content.get("tasks", {}).items():
            _add(found.tasks, name, _wanted(path, name, values or {}))
        found.averages |= content.get("averages", {})
        found.paper |= content.get("paper", {})
        found.perplexity += content.get("perplexity", [])
        if folder := content.get("folder"):
            found.folders.append(path.parent / folder)
    for folder in found.folders:
        if not folder.is_dir() and "=" in folder.name:
            raise UserError(f"--include {folder}: overrides such as {folder} stand before --include, behind the config")
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give that of the tasks' YAML files")
    known = set(found.tasks)
    for name, weights in found.averages.items():
        if lacking := weights.keys() - known:
            raise UserError(f"averages: {name} is made of {sorted(lacking)[0]}, which is no task of the list: add it")
        known.add(name)
    return found


def average(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of tasks' values."""
    return sum(weight * values[name] for name, weight in weights.items()) / sum(weights.values())


def _add(tasks: dict[str, Wanted], name: str, wanted: Wanted) -> None:
    if (before := tasks.setdefault(name, wanted)) != wanted:
        raise UserError(
            f"the task {name} is given twice, with {_said(before)} and {_said(wanted)}: leave one of them out"
        )


def _said(wanted: Wanted) -> str:
    """Settings in words, e.g. ``metric acc and shots 5``."""
    given = [f"{name} {value}" for name, value in vars(wanted).items() if value is not None]
    return " and ".join(given) or "what it says itself"


def _refuse_no_name(word: str) -> None:
    if "=" in word:
        raise UserError(f"--tasks {word}: overrides such as {word} stand before --tasks, behind the config")
    if "," in word:
        raise UserError(f"unknown task {word!r}: put blanks between tasks, --tasks {word.replace(',', ' ')}")


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text("utf-8"), StrictLoader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the task list {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise UserError(f"{path} must hold `tasks:` with a line `name: {{metric: ..., shots: ...}}` for each")
    for section in content:
        if section not in _SECTIONS:
            raise UserError(unknown(f"section in {path}:", str(section), _SECTIONS))
    return content


def _wanted(path: Path, name: str, values: dict[str, Any]) -> Wanted:
    for key in values:
        if key not in ("metric", "shots"):
            raise UserError(unknown(f"key of the task {name} in {path}:", str(key), ("metric", "shots")))
    shots = values.get("shots")
    if shots is not None and (not isinstance(shots, int) or shots < 0):
        raise UserError(f"shots of the task {name} in {path} is {shots!r}: give a number, 0 for none")
    return Wanted(values.get("metric"), shots)
