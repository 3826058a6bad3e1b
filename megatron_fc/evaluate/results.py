"""Results of evaluations: a JSON file per checkpoint, to which later evaluations add."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.evaluate.task_list import TaskList, average

_SCHEMA = 1
_NAMES = ("iter_*.json", "release.json")


def results_file(out: Path, checkpoint: Path) -> Path:
    """Where the results of a checkpoint lie below the folder of a run's results."""
    return out / f"{checkpoint.name}.json"


def read_results(path: Path) -> dict[str, Any]:
    """Return a checkpoint's results, {} before there are some.

    Raises:
        UserError: the file cannot be read, or another version wrote it.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read, {error.strerror}: give another --out") from error
    except ValueError as error:  # of JSON or UTF-8
        raise UserError(f"{path} is damaged, {error}: delete it, the answers beside it are kept") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no file of results: give another --out")
    if content.get("schema") != _SCHEMA:
        raise UserError(f"{path} has schema {content.get('schema')}, this version reads {_SCHEMA}: give another --out")
    return content


def add_results(path: Path, facts: dict[str, Any], section: str, found: dict[str, Any]) -> dict[str, Any]:
    """Put results into a checkpoint's file; returns all.

    Args:
        path: the file.
        facts: of the checkpoint: iteration, tokens, connection.
        section: tasks or perplexity.
        found: by name.
    """
    content = {"schema": _SCHEMA, **read_results(path), **facts}
    content[section] = content.get(section, {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
    return content


def results_of(out: Path) -> list[dict[str, Any]]:
    """Return the results of a run's checkpoints, in the order of their tokens.

    Raises:
        UserError: there are none.
    """
    found = [read_results(path) for name in _NAMES for path in out.glob(name)]
    if not found:
        raise UserError(f"{out} has no results: give the --out of megatron-fc evaluate")
    return sorted(found, key=lambda results: results["tokens"])


def lacking(results: dict[str, Any], section: str, wanted: Mapping[str, dict[str, Any]]) -> list[str]:
    """The names without a result.

    Args:
        results: of a checkpoint.
        section: of them.
        wanted: by name, the settings that a result depends on (limit and the like), and the digest of what was read.

    Raises:
        UserError: a result is there with other settings or of other documents, and would be lost.
    """
    there = results.get(section, {})
    for name in wanted.keys() & there.keys():
        for key, value in wanted[name].items():
            if (before := there[name].get(key)) == value:
                continue
            if key == "digest":
                what = name if section == "tasks" else f"the content of {name}"
                raise UserError(
                    f"{what} has changed since the result of {results['checkpoint']} was written: give another --out"
                )
            raise UserError(
                f"{name} of {results['checkpoint']} has a result already, with {key}={before}, and not {value}: "
                f"give another --out"
            )
    return [name for name in wanted if name not in there]


def values_of(results: dict[str, Any], wanted: TaskList) -> dict[str, float]:
    """Return the values of tasks and of those averages whose tasks all have one."""
    values = {name: float(found["value"]) for name, found in results.get("tasks", {}).items()}
    for name, weights in wanted.averages.items():
        if weights.keys() <= values.keys():
            values[name] = average(values, weights)
    return values
