"""`megatron-fc convert from-hf`: plain OLMoE or OLMo2 -> a checkpoint that every layout of Megatron loads.

Megatron's own model, built without memory, says which tensors a checkpoint has and how they are called here; the
numbers come from the files one tensor at a time.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fc.checkpoints.location import refuse_existing
from megatron_fc.checkpoints.streamed import Piece, write_streamed
from megatron_fc.convert.hf_files import HuggingFaceFiles
from megatron_fc.convert.olmo_config import CONNECTED, NAMES, architecture_of, differences, huggingface_config
from megatron_fc.convert.olmo_tensors import Part, parts
from megatron_fc.convert.one_rank import one_rank, recipe_on_one_rank
from megatron_fc.errors import UserError
from megatron_fc.training import cpu_lane
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.setup import model_config

_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; others are quantised


def from_hf(source: str, config: Path, overrides: Sequence[str], target: Path) -> str:
    """Write the weights of a Hugging Face model to the folder `target`; returns what was done.

    Args:
        source: folder, or name on the hub.
        config, overrides: of the run that is to load them; its connections are left out.
        target: folder that does not exist.

    Raises:
        UserError: the model is neither OLMoE nor OLMo2 or not the config's, it lacks a tensor or has one too many, or
            the target exists.
    """
    refuse_existing(target)
    files = HuggingFaceFiles(source)
    architecture = files.model_type()
    if architecture in [f"{CONNECTED}{name}" for name in NAMES]:
        raise UserError(
            f"{source} has connections, and from-hf reads plain models alone: train on from the Megatron checkpoint "
            f"that it was made of"
        )
    if architecture not in NAMES:
        raise UserError(f"model_type={architecture} of {source} is not known: give a plain OLMoE or OLMo2")
    theirs = files.config()
    recipe = recipe_on_one_rank(config, [*overrides, "connection=residual"])
    with one_rank(recipe) as args:
        args.padded_vocab_size = _rows(args, theirs["vocab_size"])
        ours = huggingface_config(architecture_of(args, recipe), args, None, args.padded_vocab_size, "")
        for difference in differences(theirs, ours):
            raise UserError(f"{source} is not the model of {config}: {difference}")
        wanted = parts(architecture, args, None, args.padded_vocab_size)
        _refuse_other_tensors(source, files, wanted)
        if cpu_lane.needed():
            cpu_lane.fork_checkpoint_helper()
        said = _write(files, args, recipe, wanted, target)
    return f"{source} as {NAMES[architecture]}{said}: written to {target}, for load or --from"


def _rows(args: Namespace, theirs: int) -> int:
    """Of the embedding that Megatron builds; where the tokenizer says it, which is not read here, those that it has."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if args.padded_vocab_size or not args.vocab_size:
        return int(args.padded_vocab_size or theirs)
    return calculate_padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, 1, logging_enabled=False)


def _refuse_other_tensors(source: str, files: HuggingFaceFiles, wanted: list[Part]) -> None:
    shapes = {name: shape for part in wanted for name, shape in part.theirs.items()}
    names, found = shapes.keys(), files.names()
    if missing := sorted(names - found):
        raise UserError(f"{source} lacks {missing[0]}: give a whole model")
    # A buffer of earlier transformers, which is computed.
    if unexpected := sorted(name for name in found - names if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"{source} has {unexpected[0]}, which {_without_place(unexpected[0])}")
    for name, (dtype, shape) in files.headers().items():
        if name in shapes and shape != shapes[name]:
            raise UserError(
                f"{name} is {list(shape)} in {source} and {list(shapes[name])} in its config.json: give a whole model"
            )
        if name in shapes and dtype not in _DTYPES:
            raise UserError(
                f"{name} of {source} is stored as {dtype}, whose scale is unknown: save the model in bfloat16, "
                f"float16 or float32"
            )


def _without_place(name: str) -> str:
    return (
        "the config's weights, embedding and output layer in one, do not have"
        if name == "lm_head.weight"
        else ("the config's model does not have: give the config of this model")
    )


def _write(files: HuggingFaceFiles, args: Namespace, recipe: Recipe, wanted: list[Part], target: Path) -> str:
    """Write the checkpoint; returns what has become of the dtype."""
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    tensors, objects = _model_state(args, recipe, content)
    places = {place: part for part in wanted for place in part.places()}
    numbers = _Numbers(files, args.params_dtype)
    pieces = []
    for tensor in tensors:
        at, offset = tensor.global_offset[: tensor.prepend_axis_num], tensor.global_offset[tensor.prepend_axis_num :]
        size = tuple(tensor.local_shape)
        box = tuple(slice(o, o + count) for o, count in zip(offset, size, strict=True))
        make = partial(numbers.read, places[tensor.key, tuple(at)], box, (1,) * len(at) + size)
        shape, offset = tuple(tensor.global_shape), tuple(tensor.global_offset)
        pieces.append(Piece(tensor.key, shape, offset, (1,) * len(at) + size, args.params_dtype, make))
    stored = Namespace(**vars(args))
    stored.no_save_optim = stored.no_save_rng = True
    stored.mock_data = False
    common = {"args": stored, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0.0}
    write_streamed(target, {**common, **objects}, pieces, content)
    cast = numbers.dtypes - {args.params_dtype}
    return f", cast from {_name(*cast)} to {_name(args.params_dtype)}" if cast else ""


class _Numbers:
    """Reads parts; the last one is kept, of which the next piece may be another half.

    Args:
        files: of the model.
        dtype: to which they are cast.
    """

    def __init__(self, files: HuggingFaceFiles, dtype: torch.dtype) -> None:
        self._files, self._dtype = files, dtype
        self._last: tuple[tuple[str, ...], Tensor] | None = None
        self.dtypes: set[torch.dtype] = set()

    def read(self, part: Part, box: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
        if self._last is None or self._last[0] != part.names:
            tensors = [self._files.read(name) for name in part.names]
            self.dtypes.update(tensor.dtype for tensor in tensors)
            self._last = part.names, part.join(tensors).to(self._dtype)
        return self._last[1][box].contiguous().view(shape)


def _name(*dtypes: torch.dtype) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _model_state(args: Namespace, recipe: Recipe, content: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The sharded tensors of Megatron's model, without numbers, and what else its layers keep."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = model_config(args, recipe)
    config.transformer.perform_initialization = False
    config.transformer.init_model_with_meta_device = True  # Transformer Engine's layers choose their device themselves
    builder = config.get_builder_cls()(config)
    with torch.device("meta"):
        model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
    metadata = {**content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    leaves = list(nested_values(model.sharded_state_dict(metadata=metadata)))
    # Halves of a gated MLP are stored apart.
    tensors = [leaf for leaf in leaves if isinstance(leaf, ShardedTensor)]
    tensors += [
        part for leaf in leaves if isinstance(leaf, ShardedTensorFactory) for part in nested_values(leaf.build())
    ]
    objects = {leaf.unique_key: leaf for leaf in leaves if isinstance(leaf, ShardedObject)}
    parallel_state.destroy_model_parallel()
    return tensors, objects
