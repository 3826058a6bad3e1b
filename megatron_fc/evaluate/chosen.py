"""Checkpoints of a run that are evaluated, also while it writes more and deletes old ones."""

from pathlib import Path

from megatron_fc.checkpoints.integrity import intact_checkpoints, step_of
from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.errors import UserError


def chosen_checkpoints(source: Path, every: int | None) -> list[Path]:
    """Return the checkpoint that `source` stands for, or all of its complete ones at multiples of an iteration.

    Args:
        source: folder of checkpoints, or one of them.
        every: the iterations' divisor, None for the newest checkpoint alone.

    Raises:
        UserError: there is none.
    """
    if every is None:
        return [find_checkpoint(source)]
    if every < 1:
        raise UserError(f"--every {every}: give a number of iterations, 1 for every checkpoint")
    found = [path for path in reversed(intact_checkpoints(source)) if step_of(path) % every == 0]
    if not found:
        raise UserError(f"{source} has no complete checkpoint at a multiple of iteration {every}: lower --every")
    return found
