"""One task of a job: its sources' documents become a pair of indexed files per split, and a record of them.

It is a step of a datatrove pipeline, which runs it, logs it and marks it as done. datatrove's own
`MegatronDocumentTokenizer` writes under the final names from the start, and one document that the tokenizer refuses
takes its batch and the task along.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from tokenizers import Tokenizer

from megatron_fc.data.indexed import HashedFile, IndexedWriter, token_type
from megatron_fc.data.job import Job, write_json
from megatron_fc.data.reading import BadLine, Document, Reader
from megatron_fc.data.sources import Source
from megatron_fc.errors import UserError

# Enough to keep calls into the tokenizer rare; more only costs memory.
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1000, 1 << 20
_PROGRESS_SECONDS = 2.0

# With which the process of a task ends before its job's time limit.
TIME_LIMIT_CODE = os.EX_TEMPFAIL


class TokenizeTask(PipelineStep):
    """Carries out the task whose number datatrove gives.

    Args:
        folder: of the job.
    """

    type, name = "megatron_fc", "tokenize"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Make the task's files, or leave a sentence in the job's folder and raise."""
        job = Job.read(self._folder)
        job.failure(rank).unlink(missing_ok=True)
        try:
            _Task(job, rank).run()
        except (Exception, SystemExit) as error:
            with suppress(OSError):  # a full disk is one of the reasons
                job.failure(rank).parent.mkdir(exist_ok=True)
                job.failure(rank).write_text(sentence(error), "utf-8")
            raise
        job.finish()


def sentence(error: BaseException) -> str:
    """Say in one line why a task failed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SystemExit) and error.code == TIME_LIMIT_CODE:
        return "its time limit came before its end: give --time for a whole task"
    if isinstance(error, OSError):
        return f"{error.filename or 'the output folder'}: {error.strerror or error}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Task:
    def __init__(self, job: Job, number: int) -> None:
        self._job, self._number = job, number
        # A name of its own: a task that still runs although its job was given up cannot write into ours.
        self._work = job.unfinished / f"{number:05}.{uuid.uuid4().hex}"
        self._tokenizer = Tokenizer.from_file(str(job.folder / "tokenizer" / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells out a special token is text: a document that mentions the end of text does not end there.
        self._tokenizer.encode_special_tokens = True
        self._dtype = token_type(job.tokenizer.vocabulary)
        self._eos = [job.tokenizer.eos_id] if job.options.append_eos else []
        self._writers: dict[str, IndexedWriter] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._bad: Counter[str] = Counter()
        self._filtered: Counter[str] = Counter()
        self._bytes_before, self._shown = 0, 0.0

    def run(self) -> None:
        for left in self._job.unfinished.glob(f"{self._number:05}.*"):
            shutil.rmtree(left, ignore_errors=True)
        self._work.mkdir(parents=True)
        try:
            self._bad_lines = HashedFile(self._work / "bad.jsonl")
            record = {"sources": [self._tokenize(source) for source in self._job.shard(self._number)]}
            self._publish(record)
        finally:
            for writer in self._writers.values():
                with suppress(OSError):
                    writer.close()
            shutil.rmtree(self._work, ignore_errors=True)

    def _tokenize(self, source: Source) -> dict[str, Any]:
        options = self._job.options
        bad, documents = Counter[str](), 0
        reader = Reader(source, options.text_field, options.max_bytes, options.filters.fields)
        for batch in _batches(reader):
            good = []
            for item in batch:
                if isinstance(item, BadLine):
                    self._keep(source, item, bad)
                elif (reason := options.filters.of_text(item.text, item.fields)) is not None:
                    self._filtered[reason] += 1
                else:
                    good.append(item)
            for document, ids in zip(good, self._encode(good), strict=True):
                if ids is None or not len(ids):
                    kind = "tokenizer" if ids is None else "empty"
                    self._keep(source, BadLine(document.number, kind, document.text[: 1 << 16]), bad)
                else:
                    documents += self._write(document, ids)
            self._show(self._bytes_before + reader.bytes_read)
        self._bytes_before += source.size
        self._bad += bad
        return {
            "path": source.path,
            "size": source.size,
            "sha256": reader.sha256,
            "documents": documents,
            "bad": dict(sorted(bad.items())),
        }

    def _encode(self, documents: Sequence[Document]) -> list[list[int] | None]:
        """Token ids of each document, None for one that the tokenizer refuses."""
        texts = [document.text for document in documents]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:  # of which text it does not say
            if len(documents) == 1:
                return [None]
            return [self._encode([document])[0] for document in documents]
        return [encoding.ids for encoding in encodings]

    def _write(self, document: Document, ids: list[int]) -> int:
        tokens = np.array(ids + self._eos, dtype=self._dtype)
        if (reason := self._job.options.filters.of_tokens(tokens[: len(ids)])) is not None:
            self._filtered[reason] += 1
            return 0
        text = document.text.encode()
        split = "valid" if is_validation(text, self._job.options.validation) else "train"
        if split not in self._writers:
            self._writers[split] = IndexedWriter(self._work / split, self._dtype)
            self._counts[split] = Counter()
        self._writers[split].add(tokens)
        self._counts[split].update(documents=1, text_bytes=len(text))
        return 1

    def _keep(self, source: Source, line: BadLine, bad: Counter[str]) -> None:
        bad[line.kind] += 1
        said = {"file": source.path, "line": line.number, "kind": line.kind, "content": line.content}
        self._bad_lines.write(json.dumps(said).encode() + b"\n")

    def _publish(self, record: dict[str, Any]) -> None:
        """Move everything to its place, the record last."""
        self._bad_lines.close()
        splits = {}
        for split, writer in sorted(self._writers.items()):
            hashes = writer.finish()
            sizes = {kind: (self._work / f"{split}.{kind}").stat().st_size for kind in hashes}
            splits[split] = {**self._counts[split], "tokens": writer.tokens, "bytes": sizes, "sha256": hashes}
        for split in splits:
            for kind in ("bin", "idx"):
                (self._work / f"{split}.{kind}").replace(f"{self._job.prefix(split, self._number)}.{kind}")
        if self._bad:
            self._job.bad_lines(self._number).parent.mkdir(exist_ok=True)
            (self._work / "bad.jsonl").replace(self._job.bad_lines(self._number))
        counts = {"bad": dict(sorted(self._bad.items())), "filtered": dict(sorted(self._filtered.items()))}
        write_json(self._job.record(self._number), {**record, **counts, "splits": splits})

    def _show(self, size: int) -> None:
        now = time.monotonic()
        if now - self._shown < _PROGRESS_SECONDS:
            return
        self._shown = now
        documents = sum(counts["documents"] for counts in self._counts.values())
        tokens = sum(writer.tokens for writer in self._writers.values())
        new = self._work / "progress.new"
        new.write_text(json.dumps({"size": size, "documents": documents, "tokens": tokens, "bad": self._bad.total()}))
        os.replace(new, self._work / "progress.json")


def is_validation(text: bytes, share: float) -> bool:
    """Return whether a document is for validation: by its text alone, so that equal ones are on the same side."""
    return share > 0 and int.from_bytes(hashlib.sha256(text).digest()[:8]) < share * 2**64


def _batches(reader: Reader) -> Iterator[list[Document | BadLine]]:
    batch: list[Document | BadLine] = []
    size = 0
    for item in reader:
        batch.append(item)
        size += len(item.text if isinstance(item, Document) else item.content)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
