"""Where a run goes on from: its newest checkpoint, or with `on_damage: previous` the newest one that is intact."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_fc.checkpoints.integrity import INDEX, intact_checkpoints, refuse_corrupt, refuse_damaged, step_of
from megatron_fc.checkpoints.location import TRACKER, latest_checkpoint
from megatron_fc.errors import UserError

ON_DAMAGE = ("refuse", "previous")


class Resumption:
    """Finds an intact checkpoint below `args.load`, and lets Megatron load that one.

    Args:
        args: Megatron's arguments; `ckpt_step` is set where the newest checkpoint is passed over.
        on_damage: one of ON_DAMAGE. A `ckpt_step` of the user's own is never changed.
        warn: told of each checkpoint that is passed over.
    """

    def __init__(self, args: Namespace, on_damage: str, warn: Callable[[str], None]) -> None:
        self._args, self._warn = args, warn
        self._falls_back = on_damage == "previous" and args.ckpt_step is None
        self._chosen: Path | None = None

    def choose(self) -> Path | None:
        """Return the newest checkpoint whose files are complete, None where the run begins anew.

        Raises:
            UserError: it is damaged, and no other may be or can be used.
        """
        try:
            self._chosen = latest_checkpoint(Path(self._args.load), self._args.ckpt_step)
            if self._chosen is not None:
                refuse_damaged(self._chosen)
        except UserError as error:
            self._chosen = self._before(self._chosen, error)
        return self._chosen

    def check_content(self) -> None:
        """Check the content of the chosen checkpoint, or of the ones before; all ranks call it.

        Raises:
            UserError: on all ranks, as `choose`.
        """
        assert self._chosen is not None, "`choose` comes first"
        while True:
            try:
                refuse_corrupt(self._chosen)
                break
            except UserError as error:
                self._chosen = self._before(self._chosen, error)
        if self._falls_back and self._args.ckpt_step is not None:
            self._make_newest(self._chosen)

    def _before(self, damaged: Path | None, error: UserError) -> Path:
        """The newest intact checkpoint before a damaged one, or of all if it is the tracker that is damaged."""
        intact = intact_checkpoints(Path(self._args.load)) if self._falls_back else []
        older = [path for path in intact if damaged is None or step_of(path) < step_of(damaged)]
        if not older:
            raise error
        self._warn(f"{error}; on_damage=previous: this run does, and what came after {older[0].name} is trained again")
        self._args.ckpt_step = step_of(older[0])
        return older[0]

    def _make_newest(self, checkpoint: Path) -> None:
        """Let the tracker name it: Megatron reads the tracker in any case, and the next start is to find it at once."""
        if torch.distributed.get_rank() == 0:
            (Path(self._args.load) / TRACKER).write_text(str(step_of(checkpoint)))
        torch.distributed.barrier()
        self._args.ckpt_step = None


def progress_in(checkpoint: Path | None, args: Namespace) -> tuple[int, int]:
    """Return the iteration and the consumed samples that Megatron will go on from."""
    from megatron.core import dist_checkpointing

    if checkpoint is None or args.finetune or checkpoint.name == "release":
        return 0, 0
    if not (checkpoint / INDEX).exists():  # an older format
        return step_of(checkpoint), step_of(checkpoint) * args.global_batch_size
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    return int(common["iteration"]), int(common["args"].consumed_train_samples)
