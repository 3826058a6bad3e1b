"""A job that tokenizes: what it makes of what, settled when it begins, and the folder that its tasks fill.

The folder holds `job.json` and `tokenizer/` from the start, `train-00000.bin` and `.idx` (and `valid-...`) of each task
that is done with its record in `tasks/` and its bad lines in `bad/`, and `manifest.json` when all are. What a task
writes lies in `unfinished/` until it is whole. `logs/` is datatrove's: logs, and a marker per task that is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_fc.data.filters import Filters
from megatron_fc.data.sources import Source, shard
from megatron_fc.errors import UserError
from megatron_fc.training.manifests import BUILDER, MANIFEST

SPLITS = ("train", "valid")
_JOB = "job.json"
_TOLD = 3  # differences between two jobs


@dataclass(frozen=True)
class Options:
    """What a job does with each document.

    Attributes:
        text_field: field or column with the text.
        append_eos: write the tokenizer's end of text behind each document.
        validation: share of the documents that becomes the split `valid`, by the hash of the text.
        max_bytes: of a line, or of the text of a row; a longer one is a bad line.
        tasks: parts of the work, each a pair of files per split.
        filters: documents that are dropped.
    """

    text_field: str
    append_eos: bool
    validation: float
    max_bytes: int
    tasks: int
    filters: Filters


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer of a job: its name, the hash that `train` compares, ids in all, and the end of text."""

    name: str
    sha256: str
    vocabulary: int
    eos: str | None
    eos_id: int | None


@dataclass(frozen=True)
class Job:
    """A folder and what is settled about it."""

    folder: Path
    options: Options
    tokenizer: TokenizerFacts
    sources: tuple[Source, ...]
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Raises UserError where the folder holds no job."""
        try:
            said = json.loads((folder / _JOB).read_text("utf-8"))
            options = Options(**{**said["options"], "filters": Filters(**said["options"]["filters"])})
            sources = tuple(Source(**source) for source in said["sources"])
            return cls(folder, options, TokenizerFacts(**said["tokenizer"]), sources, said["versions"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder} holds no data of `megatron-fc data tokenize`") from None

    def begin(self) -> None:
        """Settle the job in its folder, or find it there.

        Raises:
            UserError: the folder holds something else, or another job.
        """
        if (self.folder / _JOB).exists():
            settled = Job.read(self.folder)._said()
            here = self._said()
            if differing := [name for name in here if settled[name] != here[name]]:
                said = "; ".join(_difference(settled[name], here[name]) for name in differing)
                raise UserError(
                    f"{self.folder} is in use by a job with other {' and '.join(differing)} ({said}): choose another "
                    f"folder, or give those in its {_JOB}"
                )
            return
        # Hidden: what a start that was killed has left.
        is_free = not self.folder.exists() or (
            self.folder.is_dir() and all(path.name.startswith(".") for path in self.folder.iterdir())
        )
        if not is_free:
            raise UserError(f"{self.folder} is in use by something else: choose an empty or a new folder")
        write_json(self.folder / _JOB, self._said())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes of this machine from the same job; the lock ends with the process, however that ends.

        Raises:
            UserError: another one holds it.
        """
        with (self.folder / _JOB).open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.folder} is in use by the same command, which still runs: wait for it, "
                    f"`megatron-fc data status {self.folder}` shows how far it is"
                ) from None
            except OSError:
                pass  # a file system without locks
            yield

    def shard(self, task: int) -> Sequence[Source]:
        return shard(self.sources, task, self.options.tasks)

    def record(self, task: int) -> Path:
        """What a task made, in JSON; it appears last of a task's files."""
        return self.folder / "tasks" / f"{task:05}.json"

    def prefix(self, split: str, task: int) -> Path:
        """Of a task's indexed files."""
        return self.folder / f"{split}-{task:05}"

    def bad_lines(self, task: int) -> Path:
        return self.folder / "bad" / f"{task:05}.jsonl"

    def failure(self, task: int) -> Path:
        """Why a task failed the last time, in one sentence."""
        return self.folder / "failed" / f"{task:05}"

    @property
    def unfinished(self) -> Path:
        return self.folder / "unfinished"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def missing(self) -> list[int]:
        """Return the tasks whose files are not all there, whatever datatrove's markers say."""
        return [task for task in range(self.options.tasks) if not self._is_whole(task)]

    def forget_lost(self) -> None:
        """Take back the markers of tasks whose files are not there."""
        for task in self.missing():
            (self.logs / "completions" / f"{task:05}").unlink(missing_ok=True)

    def finish(self) -> bool:
        """Write the manifest if all tasks are done; several may do so at once, they write the same."""
        if any(not self.record(task).exists() for task in range(self.options.tasks)):
            return False
        write_json(self.manifest, self._manifest())
        return True

    def _is_whole(self, task: int) -> bool:
        try:
            record = json.loads(self.record(task).read_text("utf-8"))
            return all(
                self.prefix(split, task).with_suffix(f".{kind}").stat().st_size == size
                for split, made in record["splits"].items()
                for kind, size in made["bytes"].items()
            )
        except (OSError, ValueError, KeyError):
            return False

    def _said(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "tokenizer": asdict(self.tokenizer),
            "versions": self.versions,
            "sources": [asdict(source) for source in self.sources],
        }

    def _manifest(self) -> dict[str, Any]:
        records = list(self._records())
        files: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for task, record in enumerate(records):
            for split, made in record["splits"].items():
                files[split].append({"prefix": self.prefix(split, task).name, **made})
        return {
            "builder": BUILDER,
            **{name: value for name, value in self._said().items() if name != "sources"},
            **total([record["splits"][split] for record in records for split in record["splits"]]),
            "bad": add_up([record["bad"] for record in records]),
            "filtered": add_up([record["filtered"] for record in records]),
            "files": files,
            "sources": sorted((source for record in records for source in record["sources"]), key=lambda s: s["path"]),
        }

    def _records(self) -> Iterator[dict[str, Any]]:
        for task in range(self.options.tasks):
            yield json.loads(self.record(task).read_text("utf-8"))


def _difference(there: Any, here: Any) -> str:
    """Say in what two settings differ, e.g. `validation 0.05 there, 0.01 here`."""
    if isinstance(there, list):
        there, here = ({source["path"]: f"{source['size']:,} bytes" for source in said} for said in (there, here))
    flat = [dict(_flat(said)) for said in (there, here)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    told = [f"{name} {flat[0].get(name, 'not')} there, {flat[1].get(name, 'not')} here" for name in names[:_TOLD]]
    more = [f"{len(names) - _TOLD:,} more"] if len(names) > _TOLD else []
    return ", ".join([*told, *more]) or "their order"


def _flat(said: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in said.items():
        yield from _flat(value) if isinstance(value, dict) else [(name, value)]


def total(parts: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Add up what parts of the data hold."""
    return {name: sum(part[name] for part in parts) for name in ("documents", "tokens", "text_bytes")}


def add_up(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Add up numbers by kind, in the order of the kinds' names."""
    return {kind: sum(c.get(kind, 0) for c in counts) for kind in sorted({kind for c in counts for kind in c})}


def versions() -> dict[str, str]:
    """Return those of the packages that the files depend on."""
    return {name: metadata.version(name) for name in ("tokenizers", "datatrove", "pyarrow", "orjson", "megatron-core")}


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there in one piece or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
