"""The structure of a checkpoint, read before anything is built or written over: connections, optimizer state."""

from pathlib import Path
from typing import Any

from megatron_fc.checkpoints.integrity import INDEX
from megatron_fc.connections import kinds
from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.errors import UserError


def stored_structure(checkpoint: Path) -> dict[str, int]:
    """Return the last dimension of every parameter of a connection in a `torch_dist` checkpoint, {} for a plain one.

    Megatron stacks the layers of most models along a first axis.
    """
    from megatron.core import dist_checkpointing

    sizes: dict[str, int] = {}
    for key, tensor in dist_checkpointing.load_tensors_metadata(str(checkpoint)).items():
        if is_connection_key(key) and not key.startswith("optimizer."):
            sizes[key.rpartition(".")[2]] = int(tensor.global_shape[-1])
    return sizes


def refuse_other_connection(checkpoint: Path, frac: FracConfig | None, hidden_size: int) -> None:
    """Check that a run's connections are those of the checkpoint it is about to continue.

    Raises:
        UserError: they differ; names both and the way out.
    """
    if not (checkpoint / INDEX).exists():
        return
    stored = stored_structure(checkpoint)
    wanted = frac.last_dimensions(hidden_size) if frac is not None else {}
    if stored != wanted:
        raise UserError(
            f"the checkpoint {checkpoint} has {describe_structure(stored)}, this run has {describe_structure(wanted)}: "
            f"give the run another run_dir, or the connection that it was started with"
        )
    stamped = _stamp(checkpoint)
    if frac is not None and stamped is not None and stamped != frac:
        raise UserError(
            f"the checkpoint {checkpoint} was trained with {stamped}, this run has {frac}: "
            f"give the run another run_dir, or the options that it was started with"
        )


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


def _stamp(checkpoint: Path) -> FracConfig | None:
    """The options among the arguments that Megatron keeps in a checkpoint; None without `--frac-*` flags."""
    from megatron.core import dist_checkpointing

    from megatron_fc.megatron.flags import stored_frac_config

    args: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return stored_frac_config(args) if args is not None else None


def describe_structure(sizes: dict[str, int]) -> str:
    """Say in words what `stored_structure` returned."""
    if not sizes:
        return "plain residual connections"
    config = kinds.recognise(sizes)
    return f"connections of an unknown kind, {sizes}" if config is None else config.description
