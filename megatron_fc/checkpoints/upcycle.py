"""Upcycling: a plain checkpoint -> one with connections that make the same network, and back while they still do.

The weights, the optimizer state, the random states and the progress stay the same bytes. What is added are the
connections of the model that the new run builds, at values at which it is the residual one, and for each of them the
kinds of optimizer state that the checkpoint has for the other parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from megatron_fc.checkpoints.derive import derive_checkpoint
from megatron_fc.connections import kinds
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.ends import LearnedLeave
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.connections.site import Site
from megatron_fc.errors import UserError
from megatron_fc.megatron.flags import store_connection
from megatron_fc.megatron.stored_connections import describe_structure, stored_structure

_STATE = "optimizer.state."
# Names of the half-precision and of the distributed optimizer for a parameter's fp32 copy.
_COPIES = ("fp32_param", "param", "master_param")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class _Wanted:
    """What the model asks for under one key.

    Attributes:
        shape: of the global tensor.
        padded: Megatron lets the shapes differ (the vocabulary is padded for a layout).
        trained: the optimizer has state for it.
    """

    shape: tuple[int, ...]
    padded: bool = False
    trained: bool = False


def upcycle(
    chunks: list[nn.Module], source: Path, target: Path, connection: ConnectionConfig, with_optimizer: bool = True
) -> str:
    """Write the folder `target`: the plain checkpoint `source` with the connections of a model.

    Every rank calls it, under any layout.

    Args:
        chunks: this rank's chunks of the new model, not yet wrapped; its connections are set to their start.
        source: folder of the plain checkpoint, `.../iter_0000100`.
        target: folder that does not exist or is empty.
        connection: the options of the connections, kept in the checkpoint's arguments.
        with_optimizer: keep the optimizer state, else leave it out.

    Returns:
        What was added, in a sentence.

    Raises:
        UserError: the checkpoint is not that of this model without connections, or the connections can never be plain
            ones. Nothing has been written then.
    """
    connection.refuse_residual_start()
    refuse_connected(source)
    _start_as_residual(chunks)
    common = dist_checkpointing.load_common_state_dict(str(source))
    content = common.get("content_metadata") or {}
    groups = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state_dicts = [chunk.sharded_state_dict(metadata={**content, **groups}) for chunk in chunks]  # type: ignore[operator]
    wanted = _gathered(state_dicts)
    stored = dist_checkpointing.load_tensors_metadata(str(source))
    _check_weights(source, wanted, stored)
    states = _optimizer_states(source, wanted, stored, common) if with_optimizer else {}

    added: dict[str, ShardedTensor] = {}
    for tensor, _ in _tensors(state_dicts):
        if is_connection_key(tensor.key):
            name = f"{tensor.key}{tensor.global_offset}"
            added[name] = tensor
            added |= {f"{state}.{name}": _fresh_state(tensor, state, dtype) for state, dtype in states.items()}
    if "args" in common:
        store_connection(common["args"], connection)
        common["args"].no_save_optim = common["args"].no_save_optim or not with_optimizer
    derive_checkpoint(source, target, common, added, lambda key: not with_optimizer and _of_optimizer(key))
    count = sum(is_connection_key(key) for key in wanted)
    return (
        f"{count} {connection.label} tensors are missing in {source} and start as plain residuals, "
        f"{'their optimizer state' if states else 'the optimizer'} starts at zero: written to {target}"
    )


def to_residual(source: Path, target: Path) -> str:
    """Write the folder `target`: the checkpoint `source` without its connections, which must be identities.

    Raises:
        UserError: there are none, they have been trained, or the optimizer state cannot be told apart. Nothing has
            been written then.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(source))
    keys = [key for key in stored if is_connection_key(key) and not _of_optimizer(key)]
    if not keys:
        raise UserError(f"the checkpoint {source} has plain residual connections already: nothing to convert")
    structure = stored_structure(source)
    connection = kinds.recognise(structure)
    if connection is None:
        raise UserError(
            f"the checkpoint {source} has {describe_structure(structure)}: convert it with the release that wrote it"
        )
    common = dist_checkpointing.load_common_state_dict(str(source))
    _refuse_buckets(source, stored, common)
    tensors = {key: torch.empty(stored[key].global_shape, dtype=stored[key].dtype) for key in keys}
    load_tensors(tensors, storage_reader=FileSystemReader(source), no_dist=True)
    for key, tensor in tensors.items():
        if not connection.is_identity(key.rpartition(".")[2], tensor):
            raise UserError(
                f"{key} of the checkpoint {source} is no identity any more, a model with plain residual connections "
                f"would compute something else: convert checkpoints that were upcycled and not trained since"
            )
    if "args" in common:
        store_connection(common["args"], None)
    derive_checkpoint(source, target, common, {}, is_connection_key)
    return f"{len(keys)} {connection.label} tensors of {source} are identities and were left out: written to {target}"


def refuse_connected(source: Path) -> None:
    """Check that a checkpoint is plain.

    Raises:
        UserError: it has connections.
    """
    if structure := stored_structure(source):
        raise UserError(
            f"the checkpoint {source} has {describe_structure(structure)} already: train on with load={source.parent}, "
            f"or give the checkpoint of a model with plain residual connections"
        )


def _start_as_residual(chunks: list[nn.Module]) -> None:
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, (Site, LearnedLeave)):
            module.start_as_residual()


def _tensors(state_dicts: list[Any]) -> Iterator[tuple[ShardedTensor, bool]]:
    """This rank's sharded tensors as they lie in a checkpoint, and whether each is trained."""
    for leaf in (leaf for state_dict in state_dicts for leaf in nested_values(state_dict)):
        trained = isinstance(getattr(leaf, "data", None), nn.Parameter) and leaf.data.requires_grad
        if isinstance(leaf, ShardedTensorFactory):
            # One parameter that is stored in several pieces, as the two halves of a gated MLP.
            yield from ((part, trained) for part in nested_values(leaf.build()))
        elif isinstance(leaf, ShardedTensor):
            yield leaf, trained


def _gathered(state_dicts: list[Any]) -> dict[str, _Wanted]:
    """What the ranks' models ask for, together."""
    own = {
        tensor.key: _Wanted(tuple(tensor.global_shape), tensor.allow_shape_mismatch, trained)
        for tensor, trained in _tensors(state_dicts)
    }
    parts: list[dict[str, _Wanted]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return {key: want for part in parts for key, want in part.items()}


def _check_weights(source: Path, wanted: dict[str, _Wanted], stored: dict[str, Any]) -> None:
    """Exactly the connections may be missing, nothing may be left over, the shapes are the model's."""
    plain = {key: want for key, want in wanted.items() if not is_connection_key(key)}
    found = {key for key in stored if not _of_optimizer(key)}
    remedy = "give the config of the run that wrote it, the connection apart"
    if missing := sorted(plain.keys() - found):
        raise UserError(f"the checkpoint {source} lacks {_some(missing)} of this model: {remedy}")
    if unexpected := sorted(found - plain.keys()):
        raise UserError(f"the checkpoint {source} has {_some(unexpected)}, unknown to this model: {remedy}")
    for key, want in plain.items():
        shape = tuple(stored[key].global_shape)
        if shape != want.shape and not want.padded:
            raise UserError(f"{key} has shape {shape} in the checkpoint {source}, {want.shape} in this model: {remedy}")


def _optimizer_states(
    source: Path, wanted: dict[str, _Wanted], stored: dict[str, Any], common: dict[str, Any]
) -> dict[str, torch.dtype]:
    """The kinds of optimizer state that the checkpoint keeps for each parameter, {} if it has none."""
    _refuse_buckets(source, stored, common)
    trained = {key for key, want in wanted.items() if want.trained and not is_connection_key(key)}
    keys: dict[str, set[str]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in filter(_of_optimizer, stored):
        state, _, key = name.removeprefix(_STATE).partition(".")
        keys.setdefault(state, set()).add(key)
        dtypes[state] = stored[name].dtype
    if unknown := sorted(keys.keys() - {*_COPIES, *_MOMENTS}):
        raise UserError(
            f"the checkpoint {source} has an optimizer state {unknown[0]}, whose value for a fresh parameter is not "
            f"known here: set no_load_optim=true to begin with a fresh optimizer"
        )
    for state, having in keys.items():
        if different := sorted(trained ^ having):
            raise UserError(
                f"the checkpoint {source} has the optimizer state {state} for other parameters than this model "
                f"trains, {_some(different)}: set no_load_optim=true to begin with a fresh optimizer"
            )
    return dtypes


def _refuse_buckets(source: Path, stored: dict[str, Any], common: dict[str, Any]) -> None:
    """Optimizer state of the distributed optimizer's buckets cannot be told apart by parameter."""
    if getattr(common.get("args"), "no_save_optim", False):
        return
    sharding = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type", "fully_reshardable")
    by_parameter = all(name.startswith(_STATE) for name in stored if _of_optimizer(name))
    if sharding != "fully_reshardable" or not by_parameter:
        raise UserError(
            f"the checkpoint {source} keeps its optimizer state in buckets ({sharding}), not by parameter: write it "
            f"with dist_ckpt_optim_fully_reshardable=true, or set no_load_optim=true for a fresh optimizer"
        )


def _of_optimizer(key: str) -> bool:
    return key.startswith(("optimizer.", "chained_"))


def _fresh_state(tensor: ShardedTensor, state: str, dtype: torch.dtype) -> ShardedTensor:
    assert tensor.data is not None
    data = tensor.data.detach().to(dtype) if state in _COPIES else torch.zeros_like(tensor.data, dtype=dtype)
    return replace(tensor, key=f"{_STATE}{state}.{tensor.key}", data=data, dtype=dtype)


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
