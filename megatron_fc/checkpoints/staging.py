"""A folder that appears when it is complete: it is written beside its place, under a name of this process alone."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from megatron_fc.checkpoints.location import refuse_existing
from megatron_fc.errors import UserError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give an empty folder, and rename it to `target` when the block is through; of a block that fails nothing stays.

    What a killed process leaves is `.NAME.*.incomplete`, beside the target.

    Args:
        target: folder that does not exist or is empty.

    Raises:
        UserError: something is there, before the block or, written by another process meanwhile, behind it; or the
            system makes no folder there.
    """
    refuse_existing(target)
    staging = target.parent / f".{target.name}.{uuid4().hex[:8]}.incomplete"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written, {error.strerror}: give another folder") from error
    try:
        yield staging
        refuse_existing(target)
        os.rename(staging, target)  # an empty folder is replaced
    finally:
        shutil.rmtree(staging, ignore_errors=True)
