"""The content of a checkpoint, checked before anything is built or written over: connections, optimizer state."""

from pathlib import Path
from typing import Any

from megatron_fc.checkpoints.integrity import INDEX
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.errors import UserError
from megatron_fc.megatron.stored_connections import difference, fitting_overrides


def refuse_other_connection(checkpoint: Path, connection: ConnectionConfig | None, hidden_size: int) -> None:
    """Check that a run's connections are those of the checkpoint it is about to continue.

    Raises:
        UserError: they differ; names both and the way out.
    """
    if not (checkpoint / INDEX).exists():
        return
    if differs := difference(checkpoint, connection, hidden_size):
        raise UserError(f"{differs}: give the run another run_dir, or the connection that it was started with")


def refuse_misread_connection(checkpoint: Path, connection: ConnectionConfig | None, hidden_size: int) -> None:
    """Check that a config's connections are those of a checkpoint that is only read: evaluated, converted.

    Raises:
        UserError: they differ; names both and the settings that are the checkpoint's.
    """
    if not (checkpoint / INDEX).exists():
        return
    if differs := difference(checkpoint, connection, hidden_size):
        fitting = " ".join(fitting_overrides(checkpoint, connection))
        raise UserError(f"{differs}: " + (f"add {fitting}" if fitting else "give the config that it was written with"))


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint was written with its optimizer's state, as far as it says so."""
    from megatron.core import dist_checkpointing

    if checkpoint.name == "release" or not (checkpoint / INDEX).exists():
        return True
    stored: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return not getattr(stored, "no_save_optim", False)


def refuse_missing_optimizer(checkpoint: Path) -> None:
    """Check that a run which goes on with the optimizer's state finds it in a checkpoint.

    Raises:
        UserError: it was written without.
    """
    if not has_optimizer(checkpoint):
        raise UserError(
            f"the checkpoint {checkpoint} holds no optimizer state: set finetune=true to start a run at iteration 0 "
            f"from its weights, or no_load_optim=true to go on from its iteration with a fresh optimizer"
        )
