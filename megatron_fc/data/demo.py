"""`megatron-fc data demo`: corpus, tokenizer and Megatron's indexed files, built once and then reused."""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import tokenizers

from megatron_fc.data import corpus, tokenizer
from megatron_fc.data.corpus import Document, Root
from megatron_fc.errors import UserError

VALIDATION_FRACTION = 0.025
# The tokenizer of 8 MB needs 1 % more tokens than that of the whole corpus, which takes four times as long.
TOKENIZER_SAMPLE_BYTES = 8_000_000

# Raised when the same settings give other files than before: finished folders are then rebuilt.
_RECIPE = 1
_BUILDER = "megatron-fc data demo"
_MANIFEST = "manifest.json"
_TOKENIZER = "tokenizer"
_SPLITS = ("train", "valid")
# What a rebuild may remove. The folders train/ and valid/ are Megatron's: it caches the sample order of a
# prefix in `<prefix>/cache`, of files that are then gone.
_OWNED = frozenset({_MANIFEST, _TOKENIZER, *_SPLITS, *(f"{s}.{x}" for s in _SPLITS for x in ("bin", "idx"))})


@dataclass(frozen=True)
class DemoData:
    """A finished build. Prefixes are what Megatron's `--train-data-path` takes: paths without .bin/.idx."""

    root: Path
    tokenizer: Path
    train_prefix: Path
    valid_prefix: Path
    train_tokens: int
    valid_tokens: int
    documents: int
    text_bytes: int
    reused: bool


def build_demo_data(
    out: Path,
    *,
    vocab_size: int = 4096,
    report: Callable[[str], None],
    roots: Sequence[Root] | None = None,
) -> DemoData:
    """Builds the data set in the folder `out`, or reuses the one there if settings and contents still hold.

    `report` gets one line of text per step. `roots` replaces the text that is installed on this machine.
    `out` appears only when everything in it is complete. Raises UserError when the vocabulary does not
    suit the corpus, there is too little text, or `out` cannot be written or holds other files.
    """
    tokenizer.check_vocab_size(vocab_size)
    out = out.resolve()
    roots = corpus.installed_roots() if roots is None else roots
    settings = _settings(vocab_size, roots)
    try:
        found = _finished(out, settings)
        if found is not None:
            report(f"{out} is up to date")
            return _demo_data(out, found, reused=True)
        _check_replaceable(out)
        return _build(out, settings, roots, report)
    except OSError as error:
        raise UserError(f"cannot write the demo data to {out}: {error.strerror or error}") from error


def _settings(vocab_size: int, roots: Sequence[Root]) -> dict[str, Any]:
    return {
        "recipe": _RECIPE,
        "vocab_size": vocab_size,
        "validation_fraction": VALIDATION_FRACTION,
        "tokenizer_sample_bytes": TOKENIZER_SAMPLE_BYTES,
        "sources": {root.name: root.version for root in roots},
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
    }


def _build(out: Path, settings: dict[str, Any], roots: Sequence[Root], report: Callable[[str], None]) -> DemoData:
    # A sibling, so that the last step is a rename within one file system: there or not there.
    work = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    new = work / "new"
    new.mkdir(parents=True)
    try:
        manifest = _write(new, settings, roots, report)
        other = _finished(out, settings)
        if other is not None:
            # Another process built the same meanwhile and may already be reading it.
            return _demo_data(out, other, reused=True)
        if out.exists():
            out.rename(work / "old")
        new.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _demo_data(out, manifest, reused=False)


def _write(
    folder: Path, settings: dict[str, Any], roots: Sequence[Root], report: Callable[[str], None]
) -> dict[str, Any]:
    documents = corpus.collect(roots)
    valid = [d for d in documents if corpus.is_validation(d, VALIDATION_FRACTION)]
    train = [d for d in documents if not corpus.is_validation(d, VALIDATION_FRACTION)]
    if not valid or not train:
        raise UserError(
            f"found {len(train)} documents for training and {len(valid)} for validation in "
            f"{', '.join(str(root.folder) for root in roots)}: both splits need at least one"
        )
    text_bytes = _text_bytes(documents)
    report(f"collected {len(documents):,} documents, {text_bytes / 1e6:.1f} MB of text")

    texts = (document.text for document in corpus.sample(train, TOKENIZER_SAMPLE_BYTES))
    bpe = tokenizer.train(texts, settings["vocab_size"])
    tokenizer.save(bpe, folder / _TOKENIZER)
    report(f"trained a tokenizer of {bpe.get_vocab_size():,} tokens")

    # Here and not above: importing Megatron takes seconds, which neither a reuse nor an error should cost.
    from megatron_fc.data.indexed import write_indexed

    eod = bpe.get_vocab()[tokenizer.EOD]
    splits: dict[str, dict[str, int]] = {}
    for name, part in zip(_SPLITS, (train, valid), strict=True):
        ids = tokenizer.encode(bpe, (document.text for document in part))
        tokens = write_indexed(folder / name, ids, bpe.get_vocab_size(), eod=eod)
        splits[name] = {"documents": len(part), "text_bytes": _text_bytes(part), "tokens": tokens}
        report(f"wrote {name}: {len(part):,} documents, {tokens:,} tokens")

    manifest = {
        "builder": _BUILDER,
        "settings": settings,
        "splits": splits,
        "bytes_per_token": round(text_bytes / sum(split["tokens"] for split in splits.values()), 4),
        "sha256": _checksums(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _text_bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            sums[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
    return sums


def _manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a folder that this module built, whatever its settings; None for any other folder."""
    try:
        manifest = json.loads((out / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("builder") == _BUILDER else None


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` if it was built with these settings and every file is still as it was written."""
    manifest = _manifest(out)
    if manifest is None or manifest.get("settings") != settings:
        return None
    for name, expected in manifest["sha256"].items():
        path = out / name
        if not path.is_file():
            return None
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != expected:
                return None
    return manifest


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"cannot write the demo data to {out}: it is a file, not a folder")
    entries = {path.name for path in out.iterdir()}
    foreign = entries if _manifest(out) is None else entries - _OWNED
    if foreign:
        raise UserError(
            f"cannot write the demo data to {out}: it holds other files "
            f"({', '.join(sorted(foreign)[:3])}); choose an empty or a new folder"
        )


def _demo_data(out: Path, manifest: dict[str, Any], *, reused: bool) -> DemoData:
    train, valid = (manifest["splits"][name] for name in _SPLITS)
    return DemoData(
        root=out,
        tokenizer=out / _TOKENIZER,
        train_prefix=out / _SPLITS[0],
        valid_prefix=out / _SPLITS[1],
        train_tokens=train["tokens"],
        valid_tokens=valid["tokens"],
        documents=train["documents"] + valid["documents"],
        text_bytes=train["text_bytes"] + valid["text_bytes"],
        reused=reused,
    )
