"""The connections that a checkpoint holds, against those of the model that is to load it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_fc.connections import kinds
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import stored_connection

# Of Megatron's `--dist-ckpt-strictness`: with the others it fails where the checkpoint lacks what the model asks for.
_STARTS_WHAT_IS_MISSING = ("log_all", "return_all", "ignore_all")


def stored_structure(checkpoint: Path) -> dict[str, int]:
    """Return the last dimension of every parameter of a connection in a distributed checkpoint, {} for a plain one.

    Megatron stacks the layers of most models along a first axis.
    """
    return {
        key.rpartition(".")[2]: shape[-1]
        for key, shape in _shapes(checkpoint).items()
        if is_connection_key(key) and not key.startswith("optimizer.")
    }


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Of the global tensors, by name."""
    if _is_megatrons(checkpoint):
        tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        return {key: tuple(tensor.global_shape) for key, tensor in tensors.items()}
    # torch's own format, as torch_dcp and fsdp_dtensor write it.
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {key: tuple(value.size) for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}


def _is_megatrons(checkpoint: Path) -> bool:
    return bool(dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint)))


def describe_structure(sizes: dict[str, int]) -> str:
    """Say in words what `stored_structure` returned."""
    if not sizes:
        return "plain residual connections"
    config = kinds.recognise(sizes)
    return f"connections of an unknown kind, {sizes}" if config is None else config.description


def difference(checkpoint: Path, connection: ConnectionConfig | None, hidden_size: int) -> str | None:
    """Say how the connections of a distributed checkpoint differ from a model's, None if they do not.

    What no parameter shows is compared where the checkpoint keeps the flags.
    """
    stored = stored_structure(checkpoint)
    wanted = connection.last_dimensions(hidden_size) if connection is not None else {}
    if stored != wanted:
        has, asked = describe_structure(stored), describe_structure(wanted)
        where = "" if has != asked else f" for another width than hidden_size={hidden_size}"
        return f"the checkpoint {checkpoint} has {has}{where}, this run has {asked}"
    stamped = _stamp(checkpoint)
    if connection is not None and stamped is not None and stamped != connection:
        theirs, ours = stamped.to_dict(), connection.to_dict()
        names = [name for name in ours if theirs.get(name) != ours[name]] if stamped.kind == connection.kind else []
        if names:
            was, has = (", ".join(f"{name}={values[name]}" for name in names) for values in (theirs, ours))
            return f"the checkpoint {checkpoint} was trained with {was}, this run has {has}"
        return f"the checkpoint {checkpoint} was trained with {stamped}, this run has {connection}"
    return None


def refuse_other_checkpoint(args: Namespace | None, connection: ConnectionConfig) -> None:
    """Check the checkpoint that Megatron's arguments name, before a model of a named spec is built for it.

    Megatron itself leaves out what a model does not ask for (its default strictness). Those of the format
    `torch` are seen when they are loaded, by `plain_names`.

    Raises:
        UserError: the connections in it differ from the model's.
    """
    checkpoint = None if args is None else _checkpoint_to_load(args)
    if args is None or checkpoint is None:
        return
    stored = stored_structure(checkpoint)
    drops_nothing = stored.items() < connection.last_dimensions(args.hidden_size).items()
    if drops_nothing and args.dist_ckpt_strictness in _STARTS_WHAT_IS_MISSING:
        return
    if differs := difference(checkpoint, connection, args.hidden_size):
        raise UserError(
            f"{differs}: "
            + ("name the spec that it was trained with" if stored else "convert it by `megatron-fc upcycle`")
            + ", or give another --load"
        )


def _checkpoint_to_load(args: Namespace) -> Path | None:
    """The folder of a distributed checkpoint, as Megatron finds it; read by this rank alone, without a collective."""
    from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

    for folder in (args.load, getattr(args, "pretrained_checkpoint", None)):
        tracker = None if folder is None else Path(get_checkpoint_tracker_filename(folder))
        if tracker is not None and tracker.is_file():
            word = tracker.read_text().strip()
            step = getattr(args, "ckpt_step", None) or (int(word) if word.isdigit() else 0)
            found = Path(get_checkpoint_name(folder, step, word == "release", return_base_dir=True))
            return found if (found / ".metadata").exists() else None
    return None


def _stamp(checkpoint: Path) -> ConnectionConfig | None:
    """The options among the arguments that Megatron keeps in a checkpoint; None without those of a connection."""
    if not _is_megatrons(checkpoint):
        return None
    args: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    return stored_connection(args) if args is not None else None
