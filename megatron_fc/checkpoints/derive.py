"""A torch_dist checkpoint made from another one: some tensors left out, others added, the rest the same bytes.

The files of a torch_dist checkpoint hold whole shards of global tensors, and its `.metadata` says where each of them
lies. So nothing that stays has to be read, whatever layout wrote it: its files are copied, the new tensors are saved
by Megatron next to them, and the two indexes become one.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME, save_integrity_manifest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_fc.checkpoints.location import TRACKER, refuse_existing
from megatron_fc.errors import UserError

_INDEX = ".metadata"
# Written anew with the added part. common.pt is where Megatron before 0.19 kept what is no tensor.
_NOT_COPIED = (_INDEX, "metadata.json", "common.pt", INTEGRITY_FNAME)


def derive_checkpoint(
    source: Path, target: Path, common: dict[str, Any], added: dict[str, Any], drop: Callable[[str], bool]
) -> None:
    """Write the folder `target`, with Megatron's tracker file and the checkpoint; every rank calls it.

    It is written into a sibling folder and renamed when it is complete.

    Args:
        source: folder of a checkpoint, `.../iter_0000100`.
        target: folder that does not exist or is empty.
        common: what the new checkpoint holds besides tensors, as `load_common_state_dict` returns it.
        added: this rank's sharded tensors that the source lacks, by any name.
        drop: true for the keys of tensors that are left out.

    Raises:
        UserError: the target exists, or it cannot be written.
    """
    refuse_existing(target)
    staging = target.parent / f".{target.name}.incomplete"
    folder = staging / source.name

    def begin() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        folder.mkdir(parents=True)

    try:
        _on_first_rank(begin)
        dist_checkpointing.save({**common, **added}, str(folder))
        superseded = _read(folder).state_dict_metadata

        def stays(key: str) -> bool:
            return key not in superseded and not drop(key)

        def finish() -> None:
            _join_indexes(source, folder, stays)
            if (source / INTEGRITY_FNAME).exists():
                save_integrity_manifest(str(folder))
            tracked = source.name if source.name == "release" else str(int(source.name.removeprefix("iter_")))
            (staging / TRACKER).write_text(tracked)
            os.rename(staging, target)

        _on_every_rank(lambda: _copy_share(source, folder, stays))
        _on_first_rank(finish)
    finally:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _copy_share(source: Path, folder: Path, stays: Callable[[str], bool]) -> None:
    """Copy this rank's share of the source's files.

    They are not linked: a run that repeats the source's last iterations writes over its files in place.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    needed = {info.relative_path for index, info in _read(source).storage_data.items() if stays(index.fqn)}
    files = sorted(path for path in source.iterdir() if path.is_file() and path.name not in _NOT_COPIED)
    files = [path for path in files if path.suffix != ".distcp" or path.name in needed]
    for path in files[rank::ranks]:
        shutil.copyfile(path, folder / _kept_name(path.name))


def _kept_name(name: str) -> str:
    """Every checkpoint numbers its files from __0_0.distcp on, the added part too."""
    return f"kept{name}" if name.endswith(".distcp") else name


def _join_indexes(source: Path, folder: Path, stays: Callable[[str], bool]) -> None:
    kept, added = _read(source), _read(folder)
    # Changed in place: Megatron hangs attributes of its own on this object.
    kept.state_dict_metadata = {key: value for key, value in kept.state_dict_metadata.items() if stays(key)}
    kept.state_dict_metadata |= added.state_dict_metadata
    kept.storage_data = {
        index: replace(info, relative_path=_kept_name(info.relative_path))
        for index, info in kept.storage_data.items()
        if stays(index.fqn)
    }
    kept.storage_data |= added.storage_data
    kept.planner_data, kept.storage_meta = added.planner_data, added.storage_meta
    with open(folder / _INDEX, "wb") as index:
        pickle.dump(kept, index)


def _read(folder: Path) -> Any:
    return FileSystemReader(folder).read_metadata()


def _on_first_rank(action: Callable[[], None]) -> None:
    _on_every_rank(action if torch.distributed.get_rank() == 0 else lambda: None)


def _on_every_rank(action: Callable[[], None]) -> None:
    """Run it and wait for the others; a failure of one rank is raised on all of them, which would else wait for it."""
    failure = None
    try:
        action()
    except OSError as error:
        failure = f"the checkpoint could not be written: {error}"
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    for text in failures:
        if text:
            raise UserError(text)
