"""Documents in files, a small tokenizer, and what `megatron-fc data tokenize` makes of them."""

import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from megatron_fc.data import tokenizer
from megatron_fc.data.filters import Filters
from megatron_fc.data.tokenize import Local, tokenize

WORDS = ["the", "of", "fraction", "connection", "stream", "é中", "wid\tth", "depth", "residual", "3.14", "layer", "a_b"]
WORDS += ["<|endoftext|>", " gate", "\n"]


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Return random texts of some words each."""
    random = np.random.default_rng(seed)
    return [f"{n} " + " ".join(random.choice(WORDS, random.integers(1, longest))) for n in range(count)]


def save_tokenizer(folder: Path, size: int = 300) -> Path:
    """Train a tokenizer of these texts' kind; returns its folder."""
    tokenizer.save(tokenizer.train(texts(500, seed=99), size), folder)
    return folder


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def write_lines(path: Path, lines: Sequence[bytes]) -> Path:
    """Write lines, packed as the name's ending says, a gzip or zstd archive of two parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = [b"".join(line + b"\n" for line in part) for part in (lines[::2], lines[1::2])]
    pack = {".gz": gzip.compress, ".zst": _zstd}.get(path.suffix, bytes)
    path.write_bytes(b"".join(pack(half) for half in halves))
    return path


def write_documents(path: Path, documents: Sequence[str], **fields: Any) -> Path:
    """Write JSON lines in their order; returns the path."""
    lines = [json.dumps({"text": text, **fields}).encode() for text in documents]
    half = len(lines) // 2
    interleaved = [line for pair in zip(lines[:half], lines[half:], strict=False) for line in pair] + lines[2 * half :]
    return write_lines(path, interleaved)


def make(inputs: Sequence[Path], out: Path, name: Path, *, workers: int = 1, **options: Any) -> list[str]:
    """Tokenize here; returns what was reported."""
    said: list[str] = []
    settings = {"text_field": "text", "append_eos": True, "validation": 0.0, "max_bytes": 1 << 20, "filters": Filters()}
    tokenize(
        [str(path) for path in inputs],
        out,
        str(name),
        where=Local(workers),
        report=said.append,
        **{**settings, **options},
    )
    return said


def load(folder: Path) -> Tokenizer:
    """The tokenizer, with special tokens in a text taken as text."""
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.encode_special_tokens = True
    return loaded


def contents(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a job makes; logs tell times."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] not in ("logs", "failed")
    }


def writer(out: Path, task: int) -> int | None:
    """Return the process that has written some of a task's file, None while there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                file = os.readlink(handle)
                if file.startswith(f"{out}/unfinished/{task:05}.") and file.endswith("train.bin"):
                    return int(process.name) if handle.stat().st_size else None
    return None
