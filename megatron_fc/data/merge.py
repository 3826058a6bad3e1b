"""`megatron-fc data merge`: the files of all tasks as one pair per split.

Megatron's builder does the same with two Python lists that have an entry per document; here memory stays flat.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fc.data.indexed import HashedFile, token_type, write_index
from megatron_fc.data.job import total, write_json
from megatron_fc.errors import UserError
from megatron_fc.training.indexed_files import IndexedFiles
from megatron_fc.training.manifests import MANIFEST, folder_of, read_manifest, refuse_other_sizes

_CHUNK = 1 << 24


def merge(folder: Path, target: Path, *, report: Callable[[str], None]) -> None:
    """Write a new folder with `train` and `valid`, and a manifest; it appears when it is complete.

    Raises:
        UserError: files are not those of the manifest, the target exists or has no room.
    """
    folder = folder_of(folder)
    manifest = read_manifest(folder)
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"{folder / 'tokenizer'} does not exist: copy it again")
    if target.exists():
        raise UserError(f"{target} is in use: choose a new folder")
    target = target.absolute()
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        work.mkdir(parents=True)
        size = sum(sum(file["bytes"].values()) for files in manifest["files"].values() for file in files)
        if size > (free := shutil.disk_usage(work).free):
            raise UserError(f"{target} needs {size:,} bytes, and its disk has {free:,} left: make room for it")
        for split, files in manifest["files"].items():
            if files:
                manifest["files"][split] = [_merge(folder, files, work / split, manifest)]
                report(f"{split}: {len(files):,} pairs of files, {total(files)['documents']:,} documents")
        shutil.copytree(folder / "tokenizer", work / "tokenizer")
        write_json(work / MANIFEST, manifest)
        work.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"manifest  {target / MANIFEST}")


def _merge(folder: Path, files: list[dict[str, Any]], prefix: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    dtype = token_type(manifest["tokenizer"]["vocabulary"])
    data, lengths = HashedFile(Path(f"{prefix}.bin")), []
    try:
        for file in files:
            source = str(folder / file["prefix"])
            refuse_other_sizes(source, file)
            indexed = IndexedFiles.read(source, source)
            if indexed.dtype != dtype:
                raise UserError(f"{source} has tokens of type {indexed.dtype}, and its vocabulary asks for {dtype}")
            _copy(Path(f"{source}.bin"), data, file["sha256"]["bin"])
            lengths.append(indexed.lengths)
    finally:
        data.close()
    hashes = {"bin": data.sha256, "idx": write_index(Path(f"{prefix}.idx"), dtype, lengths)}
    sizes = {kind: Path(f"{prefix}.{kind}").stat().st_size for kind in hashes}
    return {"prefix": prefix.name, **total(files), "bytes": sizes, "sha256": hashes}


def _copy(source: Path, target: HashedFile, sha256: str) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != sha256:
        raise UserError(f"{source} is not what the manifest says, its SHA-256 differs: copy or make it again")
