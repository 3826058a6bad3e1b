"""The harness's tasks and their data, which lie in a folder that `megatron-fc evaluate fetch` fills."""

import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from megatron_fc.errors import UserError
from megatron_fc.evaluate.task_list import TaskList, Wanted
from megatron_fc.runs.writable import refuse_unwritable

# Settings that say where a task and its documents are.
_PLACES = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata"}


class Tasks:
    """The tasks of a list, loaded with their data.

    Args:
        wanted: the list.
        data: folder of `fetch`, None to let the harness look for data as it does, in its cache and on the network.

    Attributes:
        built: tasks and groups by name; of a tag its tasks.
        manager: the harness's.

    Raises:
        UserError: a task is unknown or its data are missing.
    """

    def __init__(self, wanted: TaskList, data: Path | None) -> None:
        own = [str(folder) for folder in wanted.folders] or None
        self.manager = TaskManager(include_path=own, include_defaults=False)
        if not wanted.tasks.keys() <= self.manager.task_index.keys():  # the harness's own are 14,000 files to read
            self.manager = TaskManager(include_path=own)
        _refuse_unknown(wanted, self.manager)
        self.built: dict[str, list[Task | Group]] = {}
        missing: dict[str, str] = {}
        with _read_from(data) if data else _downloading(ConfigurableTask.download):
            for name in wanted.tasks:
                try:
                    built = self.manager._load_spec(name)
                except _NoDataError as error:
                    missing[name] = str(error)
                except Exception as error:  # of packages, templates, a task's own code
                    raise UserError(
                        f"the harness cannot build the task {name}, {_said(error)}: correct the task or what it needs, "
                        f"or leave it out"
                    ) from error
                else:
                    self.built[name] = built if isinstance(built, list) else [built]
        if missing:
            _refuse_missing(missing, data)
        for name, one in wanted.tasks.items():
            self._settle(name, one)
        _refuse_twice({name: [task.task_name for task in self.leaves(name)] for name in wanted.tasks})

    def leaves(self, name: str) -> list[Task]:
        """The tasks that a name stands for."""
        return [
            task for item in self.built[name] for task in (item.get_all_tasks() if isinstance(item, Group) else [item])
        ]

    def shots(self, name: str) -> int | None:
        """Examples before the questions of a name's tasks, None where these have different numbers of them."""
        found = {int(task.get_config("num_fewshot") or 0) for task in self.leaves(name)}
        return found.pop() if len(found) == 1 else None

    def digest(self, name: str) -> str:
        """Of what a name's tasks ask and count: settings, documents, files of functions, wherever these lie."""
        digest = hashlib.sha256()
        for item in self.built[name]:
            if isinstance(item, Group):
                digest.update(_written((item.to_dict() or {}).get("aggregate_metric_list")))
        for task in self.leaves(name):
            settings = task.config.to_dict(keep_callable=True)
            digest.update(_written({key: value for key, value in settings.items() if key not in _PLACES}))
            examples = task.fewshot_docs() if task.get_config("num_fewshot") else None
            for documents in (task.eval_docs, examples):
                for document in documents or ():
                    digest.update(_written(document))
        return digest.hexdigest()[:32]

    def _settle(self, name: str, wanted: Wanted) -> None:
        for task in self.leaves(name):
            if wanted.shots is not None:
                task.set_config(key="num_fewshot", value=wanted.shots)
            _refuse_too_many_shots(name, task)
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"the task {name} runs code that the model writes, or shows pictures: leave it out; `megatron-fc "
                    f"lm-eval` runs such code if --confirm_run_unsafe_code is given"
                )
            known = getattr(task, "_metric_fn_list", {})
            if wanted.metric is not None and known and wanted.metric not in known:
                raise UserError(f"the task {name} has no metric {wanted.metric}: give one of {', '.join(known)}")


def _refuse_too_many_shots(name: str, task: Task) -> None:
    """The harness draws one example more where the question may be among them, and fails at the first question."""
    shots = int(task.get_config("num_fewshot") or 0)
    if shots == 0:
        return
    drawn = getattr(task, "fewshot_cfg", None)  # a task that is a class of Python has none
    one_more = drawn is not None and drawn.sampler == "default" and drawn.split == task.config.test_split
    if (most := len(list(task.fewshot_docs() or ())) - one_more) < shots:
        raise UserError(
            f"the task {name} is to have {shots} shots, and its data have examples for {max(most, 0)}: give fewer"
        )


def fetch(wanted: TaskList, folder: Path, report: Callable[[str], None]) -> None:
    """Put the data of tasks into a folder, from where the harness finds them.

    Args:
        wanted: the tasks.
        folder: made where it is missing; what it has already stays.
        report: told a line per task.

    Raises:
        UserError: a task is unknown, its data cannot be had, or the folder cannot be written.
    """
    refuse_unwritable(folder)
    with _stored_in(folder):
        tasks = Tasks(wanted, None)
    for name in wanted.tasks:
        count = sum(len(task.eval_docs) for task in tasks.leaves(name))
        report(f"{name}: {count:,} documents")


class _NoDataError(Exception):
    """A task's data cannot be had: of files, the network, each library's own."""


def _written(value: Any) -> bytes:
    """A line of JSON; functions as the content of the file that they are from."""
    return (json.dumps(value, sort_keys=True, default=_content) + "\n").encode()


def _content(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if not callable(value):
        return str(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    try:
        file = inspect.getsourcefile(value)
    except TypeError:  # of no file
        file = None
    return [name, hashlib.sha256(Path(file).read_bytes()).hexdigest()] if file and Path(file).exists() else name


def _said(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 160)


def _refuse_unknown(wanted: TaskList, manager: TaskManager) -> None:
    for name in wanted.tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "give --include FOLDER if it is a task of your own"
            raise UserError(f"unknown task {name!r}: {remedy}")


def _refuse_twice(leaves: dict[str, list[str]]) -> None:
    """The harness would mix up what a task has in two groups."""
    owners: dict[str, str] = {}
    for name, tasks in leaves.items():
        for task in tasks:
            if task in owners:
                raise UserError(f"the task {task} is part of {owners[task]} and of {name}: leave one of them out")
            owners[task] = name


def _refuse_missing(missing: dict[str, str], data: Path | None) -> None:
    if data is not None:
        raise UserError(
            f"the data of {', '.join(missing)} are not in {data}: where there is internet, run `megatron-fc evaluate "
            f"fetch --to {data}` with the same --tasks"
        )
    name, reason = next(iter(missing.items()))
    raise UserError(
        f"no data of {', '.join(missing)}, {name}: {reason}; where there is internet, `megatron-fc evaluate fetch --to "
        f"FOLDER` with the same --tasks stores them for --data FOLDER"
    )


@contextlib.contextmanager
def _downloading(download: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Let tasks get their data by another function than the harness's, which is yielded."""
    original = ConfigurableTask.download

    def named(*given: Any, **settings: Any) -> None:
        try:
            download(*given, **settings)
        except _NoDataError:  # of a function that is replaced here in its turn
            raise
        except Exception as error:
            raise _NoDataError(_said(error)) from error

    ConfigurableTask.download = named
    try:
        yield original
    finally:
        ConfigurableTask.download = original


@contextlib.contextmanager
def _read_from(folder: Path) -> Iterator[None]:
    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        from datasets import load_from_disk

        task.dataset = load_from_disk(str(folder / _name_of(task, dataset_kwargs)))

    with _downloading(download):
        yield


@contextlib.contextmanager
def _stored_in(folder: Path) -> Iterator[None]:
    original: list[Callable[..., None]] = []

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **others: Any) -> None:
        from datasets import DatasetDict, load_from_disk

        target = folder / _name_of(task, dataset_kwargs)
        if not target.exists():
            original[0](task, dataset_kwargs, **others)
            staging = folder / f".{target.name}.incomplete"
            DatasetDict(task.dataset).save_to_disk(str(staging))
            staging.rename(target)
        task.dataset = load_from_disk(str(target))

    with _downloading(download) as harness:
        original.append(harness)
        yield


def _name_of(task: Any, dataset_kwargs: dict[str, Any] | None) -> str:
    """The folder of a task's data: tasks of the same data share it."""
    made = task.config.task if callable(task.config.custom_dataset) else None
    kwargs = {key: value for key, value in (dataset_kwargs or {}).items() if key != "trust_remote_code"}
    asked = [task.DATASET_PATH, task.DATASET_NAME, kwargs, made]
    readable = re.sub(r"[^\w.-]+", "_", "-".join(str(word) for word in (asked[0], asked[1], made) if word))
    return f"{readable}-{hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]}"
