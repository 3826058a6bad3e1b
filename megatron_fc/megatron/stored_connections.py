"""The connections that a checkpoint holds, against those of the model that is to load it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_fc.connections import kinds
from megatron_fc.connections.config import FracConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import stored_frac_config


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


def describe_structure(sizes: dict[str, int]) -> str:
    """Say in words what `stored_structure` returned."""
    if not sizes:
        return "plain residual connections"
    config = kinds.recognise(sizes)
    return f"connections of an unknown kind, {sizes}" if config is None else config.description


def difference(checkpoint: Path, frac: FracConfig | None, hidden_size: int) -> str | None:
    """Say how the connections of a `torch_dist` checkpoint differ from a model's, None if they do not.

    What no parameter shows is compared where the checkpoint keeps `--frac-*` flags.
    """
    stored = stored_structure(checkpoint)
    wanted = frac.last_dimensions(hidden_size) if frac is not None else {}
    if stored != wanted:
        return (
            f"the checkpoint {checkpoint} has {describe_structure(stored)}, this run has {describe_structure(wanted)}"
        )
    stamped = _stamp(checkpoint)
    if frac is not None and stamped is not None and stamped != frac:
        return f"the checkpoint {checkpoint} was trained with {stamped}, this run has {frac}"
    return None


def refuse_other_checkpoint(args: Namespace | None, frac: FracConfig) -> None:
    """Check the checkpoint that Megatron's arguments name, before a model of a named spec is built for it.

    Megatron itself leaves out what a model does not ask for (its default strictness). Checkpoints of its other formats
    are seen when they are loaded, by `plain_names`.

    Raises:
        UserError: the connections in it differ from the model's.
    """
    checkpoint = None if args is None else _checkpoint_to_load(args)
    if args is None or checkpoint is None:
        return
    if differs := difference(checkpoint, frac, args.hidden_size):
        plain = not stored_structure(checkpoint)
        raise UserError(
            f"{differs}: "
            + ("convert it by `megatron-fc upcycle`" if plain else "name the spec that it was trained with")
            + ", or give another --load"
        )


def _checkpoint_to_load(args: Namespace) -> Path | None:
    """The folder of a `torch_dist` checkpoint, as Megatron finds it; read by this rank alone, without a collective."""
    from megatron.core import dist_checkpointing
    from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

    for folder in (args.load, getattr(args, "pretrained_checkpoint", None)):
        tracker = None if folder is None else Path(get_checkpoint_tracker_filename(folder))
        if tracker is not None and tracker.is_file():
            word = tracker.read_text().strip()
            step = getattr(args, "ckpt_step", None) or (int(word) if word.isdigit() else 0)
            found = get_checkpoint_name(folder, step, word == "release", return_base_dir=True)
            return Path(found) if dist_checkpointing.check_is_distributed_checkpoint(found) else None
    return None


def _stamp(checkpoint: Path) -> FracConfig | None:
    """The options among the arguments that Megatron keeps in a checkpoint; None without `--frac-*` flags."""
    from megatron.core import dist_checkpointing

    args: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return stored_frac_config(args) if args is not None else None
