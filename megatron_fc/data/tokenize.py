"""`megatron-fc data tokenize`: from text to Megatron's indexed files, with a manifest of what they hold."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fc.data.filters import FILTER_KINDS, Filters
from megatron_fc.data.job import Job, Options, TokenizerFacts, versions
from megatron_fc.data.reading import BAD_KINDS, BadLine, Reader, refuse_missing_columns, text_type
from megatron_fc.data.sources import Source, find, open_source
from megatron_fc.data.status import Progress
from megatron_fc.errors import NodeError, UserError
from megatron_fc.training.hub_tokenizer import load_tokenizer
from megatron_fc.training.manifests import read_manifest, tokenizer_hash

_MOST_TASKS = 100  # by default: one per file up to here
_LOOKED_AT = 100  # lines of the first file
_REMEDIES = {
    "json": "write a JSON object per line",
    "utf8": "write it in UTF-8, and let .gz, .zst, .bz2 or .lz4 end the name of what is packed",
    "empty": "leave it out",
    "long": "give a larger --max-bytes",
}


@dataclass(frozen=True)
class Local:
    """On this machine, with that many processes at once."""

    workers: int


@dataclass(frozen=True)
class Slurm:
    """As an array of jobs: how many at once, options of sbatch and srun, and the Python of the nodes."""

    workers: int
    sbatch: dict[str, str]
    srun: Sequence[str]
    python: str


def tokenize(
    inputs: Sequence[str],
    out: Path,
    tokenizer: str,
    *,
    where: Local | Slurm,
    tasks: int | None = None,
    eos: str | None = None,
    report: Callable[[str], None],
    **options: Any,
) -> bool:
    """Make the data in the folder `out`, or finish what an earlier call began there; returns whether all is done.

    Args:
        inputs: files, folders and patterns.
        tokenizer: a folder, or a name on the hub.
        tasks: by default one per file, up to 100.
        eos: the token that ends a document, by default the tokenizer's own.
        report: gets a line of text per step.
        options: the other fields of `Options`.

    Raises:
        UserError: before anything is written, or when a task met what another try will not mend.
        NodeError: tasks did not end; the same call does them again.
    """
    _refuse_shares(options)
    sources, left_out = find(inputs)
    if left_out:
        report(f"note: {len(left_out):,} files are left out by their endings, e.g. {left_out[0]}")
    if tasks is not None and not 1 <= tasks <= len(sources):
        raise UserError(f"--tasks={tasks}: give 1 to {len(sources):,}, a file is not divided")
    _refuse_own_output(inputs, out, sources)
    _refuse_without_text(sources[0], options["text_field"], options["max_bytes"], options["filters"])
    loaded = _load(tokenizer)
    facts = _facts(loaded, tokenizer, eos, options["append_eos"])
    settled = Options(tasks=tasks or min(len(sources), _MOST_TASKS), **options)
    job = Job(out.absolute(), settled, facts, tuple(sources), versions())
    try:
        job.begin()
        _save(loaded, job.folder / "tokenizer")
        job.forget_lost()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    if missing := job.missing():
        done = job.options.tasks - len(missing)
        size = sum(source.size for source in job.sources)
        report(
            f"{len(job.sources):,} files, {size / 1e9:,.2f} GB as stored, {job.options.tasks:,} tasks"
            + (f", {done:,} of them done" if done else "")
        )
        if isinstance(where, Slurm):
            from megatron_fc.data.executors import SlurmExecutor

            SlurmExecutor(job, where.workers, where.sbatch, where.srun, where.python).run()
            report(f"submitted; `megatron-fc data status {out}` shows how far it is")
            return False
        with job.held():
            _run_here(job, where.workers)
    else:
        report(f"{out} is complete")
    if not job.finish():
        raise NodeError(f"{out} is not complete: the same command goes on")
    _summarize(read_manifest(out), job, report)
    return True


def _run_here(job: Job, workers: int) -> None:
    from megatron_fc.data.executors import LocalExecutor

    progress = Progress(job, sys.stdout)
    try:
        failures = LocalExecutor(job, workers).run(progress.show)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on") from interrupt
    finally:
        progress.close()
    if failures:
        task, said = min(failures.items())
        many = "1 task" if len(failures) == 1 else f"{len(failures):,} tasks"
        text = (
            f"{many} of {job.options.tasks:,} failed, task {task}: {said}; the same command does again what is missing"
        )
        raise NodeError(text) if "its process" in said else UserError(text)


def _refuse_shares(options: dict[str, Any]) -> None:
    if not 0 <= options["validation"] < 1:
        raise UserError(f"--validation={options['validation']:g}: give a share of the documents from 0 to below 1")
    if options["max_bytes"] < 1:
        raise UserError(f"--max-bytes={options['max_bytes']}: give 1 or more")


def _refuse_own_output(inputs: Sequence[str], out: Path, sources: Sequence[Source]) -> None:
    """What a job writes would be among its sources when the same command goes on."""
    folder = out.resolve()
    for word in inputs:
        if "://" not in word and Path(word).is_dir() and folder.is_relative_to(Path(word).resolve()):
            raise UserError(f"--out={out} lies in {word}, all of which is read: choose a folder outside of it")
    if inside := next((source.path for source in sources if Path(source.path).is_relative_to(out.absolute())), None):
        raise UserError(f"{inside} lies in --out={out}, where this command writes: leave it out, or choose another one")


def _refuse_without_text(source: Source, field: str, limit: int, filters: Filters) -> None:
    """A field that is misspelt would make a bad line of every document, or drop them all."""
    if source.kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with open_source(source) as stored:
                schema = pq.read_schema(stored)
        except pa.ArrowException as error:
            raise UserError(f"{source.path} is broken: {error}: get it again") from None
        text_type(schema, field.split("."), source.path)
        refuse_missing_columns(schema, filters.fields, source.path)
        return
    looked_at = [item for item, _ in zip(Reader(source, field, limit), range(_LOOKED_AT), strict=False)]
    documents = [item for item in looked_at if not isinstance(item, BadLine)]
    if looked_at and not documents:
        bad = [item for item in looked_at if isinstance(item, BadLine)]
        kinds = Counter(item.kind for item in bad)
        said = ", ".join(sorted(BAD_KINDS[kind] for kind in kinds))
        most = kinds.most_common(1)[0][0]
        remedy = _REMEDIES.get(most)
        if remedy is None:
            remedy = f"--text-field is {field}, and {_fields(next(item for item in bad if item.kind == most))}"
        raise UserError(f"{source.path} has no document in its first {len(looked_at)} lines ({said}): {remedy}")
    for name in filters.fields:
        if documents and not any(name in document.fields for document in documents):
            raise UserError(
                f"{source.path} has no field {name} in its first {len(looked_at)} lines: give --stars-field the name "
                f"of the one that has the stars, or leave out --min-stars"
            )


def _fields(line: BadLine) -> str:
    """What of a line may be the text, in words."""
    try:
        names = ", ".join(json.loads(line.content)) or "no field"
    except ValueError:  # its end is not kept
        return "no field has text under this name"
    return f"line {line.number} has: {names}"


def _load(name: str) -> Any:
    loaded = load_tokenizer(name, f"--tokenizer={name}")
    if not loaded.is_fast:
        raise UserError(f"the tokenizer {name} has no tokenizer.json: give one of the library tokenizers")
    return loaded


def _facts(loaded: Any, name: str, eos: str | None, append_eos: bool) -> TokenizerFacts:
    vocabulary = loaded.get_vocab()
    eos = eos or loaded.eos_token
    if append_eos and eos not in vocabulary:
        said = f"{eos!r} is no token of" if eos else "no end of text is named by"
        raise UserError(f"{said} the tokenizer {name}: give --eos TOKEN, or --no-eos")
    facts = (tokenizer_hash(loaded), max(vocabulary.values()) + 1, eos, vocabulary.get(eos))
    return TokenizerFacts(Path(name).name if Path(name).exists() else name, *facts)


def _save(loaded: Any, folder: Path) -> None:
    """What the tasks load, and `train` may: it is the same when the name on a hub means another one."""
    if not (folder / "tokenizer.json").exists():
        loaded.save_pretrained(folder)
        new = folder / ".tokenizer.json"
        new.write_text(loaded.backend_tokenizer.to_str(), "utf-8")
        new.replace(folder / "tokenizer.json")


def _summarize(manifest: dict[str, Any], job: Job, report: Callable[[str], None]) -> None:
    report(
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['text_bytes']:,} bytes of text"
    )
    if manifest["bad"]:
        said = ", ".join(f"{count:,} {BAD_KINDS[kind]}" for kind, count in manifest["bad"].items())
        report(f"bad lines: {said}; they are in {job.folder / 'bad'}")
    if manifest["filtered"]:
        said = ", ".join(f"{count:,} for {FILTER_KINDS[kind]}" for kind, count in manifest["filtered"].items())
        report(f"left out: {said}")
    report(f"manifest  {job.manifest}")
