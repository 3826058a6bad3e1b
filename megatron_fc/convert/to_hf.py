"""`megatron-fc convert to-hf`: a checkpoint -> a folder that `AutoModelForCausalLM.from_pretrained` loads.

Tensors are read, renamed and written one at a time; what lies in memory is one file of the result.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from copy import copy
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_fc.checkpoints.changes import refuse_other_model, refuse_other_vocabulary
from megatron_fc.checkpoints.integrity import refuse_corrupt
from megatron_fc.checkpoints.location import find_checkpoint, refuse_existing
from megatron_fc.checkpoints.modelopt_state import refuse_state
from megatron_fc.checkpoints.staging import staged
from megatron_fc.checkpoints.stored_tensors import StoredTensors, is_weight
from megatron_fc.checkpoints.structure import refuse_misread_connection
from megatron_fc.convert.olmo_config import architecture_of, huggingface_config
from megatron_fc.convert.olmo_tensors import Part, parts
from megatron_fc.convert.one_rank import one_rank, recipe_on_one_rank
from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import load_tokenizer
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.refusal import refusals_named
from megatron_fc.training.tokenizer_digest import tokenizer_digest

_CODE = "megatron_fc.convert.remote_code"
_EMBEDDING = "embedding.word_embeddings.weight"
_REMEDY = "give the config of the run that wrote it"
_INDEX = "model.safetensors.index.json"


def to_hf(config: Path, overrides: Sequence[str], source: Path, target: Path, shard_bytes: int = 5 * 10**9) -> str:
    """Write the checkpoint below `source` to the folder `target`; returns what was done.

    Args:
        config, overrides: of the run that wrote it.
        source: folder of checkpoints, or one of them.
        target: folder that does not exist.
        shard_bytes: most bytes of a file, but for a tensor that is larger.

    Raises:
        UserError: the model is neither OLMoE nor OLMo2, the checkpoint or the tokenizer is not the recipe's, or the
            target exists.
    """
    checkpoint = find_checkpoint(source)
    refuse_state(checkpoint, "convert the checkpoint that it was made of")
    refuse_existing(target)
    recipe = recipe_on_one_rank(config, overrides)
    with one_rank(recipe) as args:
        architecture = architecture_of(args, recipe)
        refuse_other_model(checkpoint, args)
        refuse_misread_connection(checkpoint, recipe.connection, args.hidden_size)
        refuse_corrupt(checkpoint, of=is_weight)
    stored = StoredTensors(checkpoint)
    if not stored.keys() >= {_EMBEDDING}:
        raise UserError(f"the checkpoint {checkpoint} lacks {_EMBEDDING}: {_REMEDY}")
    rows, dtype = stored.shape(_EMBEDDING)[0], stored.dtype(_EMBEDDING)
    found = _found(checkpoint, stored, parts(architecture, args, recipe.connection, rows))
    described = huggingface_config(architecture, args, recipe.connection, rows, str(dtype).removeprefix("torch."))
    with staged(target) as staging:
        described |= _write_tokenizer(checkpoint, args, rows, staging)
        _write_code(described, staging)
        _write_card(described, recipe, staging)
        (staging / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        written, files = _write_tensors(_tensors(stored, found), staging, shard_bytes)
    name = described["architectures"][0]
    return f"{checkpoint} as {name}, {written:,} parameters in {_files(files)}: written to {target}"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _found(checkpoint: Path, stored: StoredTensors, wanted: list[Part]) -> list[tuple[Part, str, tuple[int, ...]]]:
    """Where each part lies, all of a shape that the model has; no other tensor may be there."""
    keys, found = stored.keys(), []
    held: dict[str, set[tuple[int, ...]]] = {}
    for part in wanted:
        place = next(((key, at) for key, at in part.places() if key in keys), None)
        if place is None:
            raise UserError(f"the checkpoint {checkpoint} lacks {next(part.places())[0]}: {_REMEDY}")
        found.append((part, *place))
        held.setdefault(place[0], set()).add(place[1])
    if unexpected := sorted(keys - held.keys()):
        raise UserError(f"the checkpoint {checkpoint} has {unexpected[0]}, unknown to this model: {_REMEDY}")
    layers = {stored.shape(key)[0] for part, key, at in found if part.layer is not None and at and _stacked(key)}
    if layers - {count := 1 + max(part.layer for part in wanted if part.layer is not None)}:
        raise UserError(f"the checkpoint {checkpoint} has {max(layers)} layers, and num_layers={count}: {_REMEDY}")
    for part, key, _ in found:
        # Layers and experts that lie in one tensor are counted by the places in it.
        shape = tuple(1 + max(places) for places in zip(*held[key], strict=True)) + part.shape
        if stored.shape(key) != shape:
            raise UserError(
                f"{key} is {list(stored.shape(key))} in the checkpoint {checkpoint} and {list(shape)} in this model: "
                f"{_REMEDY}"
            )
    return found


def _stacked(key: str) -> bool:
    return not key.split(".")[2].isdecimal()


def _tensors(stored: StoredTensors, found: list[tuple[Part, str, tuple[int, ...]]]) -> Iterator[tuple[str, Tensor]]:
    for part, key, at in found:
        tensors = part.split(stored.read(key, at))
        yield from ((name, tensor.contiguous()) for name, tensor in zip(part.names, tensors, strict=True))


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> tuple[int, int]:
    """Write safetensors and their index; returns how many numbers they hold, and in how many files."""
    from safetensors.torch import save_file

    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = numbers = 0

    def close() -> None:
        nonlocal size
        # A part of a larger tensor would be written with all of it.
        save_file(shard, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            close()
        shard[name] = tensor
        size, total, numbers = size + tensor.nbytes, total + tensor.nbytes, numbers + tensor.numel()
    close()
    names: dict[str, str] = {}
    for number, held in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        os.chmod(
            folder / f"{number}.part", (folder / "config.json").stat().st_mode
        )  # safetensors' are the owner's alone
        os.rename(folder / f"{number}.part", folder / file)
        names |= dict.fromkeys(held, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total, "total_parameters": numbers}, "weight_map": names}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return numbers, len(files)


def _write_tokenizer(checkpoint: Path, args: Namespace, rows: int, folder: Path) -> dict[str, Any]:
    """Write tokenizer and generation config; returns the special tokens for the model's config."""
    from transformers import GenerationConfig

    if args.tokenizer_type != "HuggingFaceTokenizer":
        raise UserError(
            f"tokenizer_type={args.tokenizer_type} cannot go with the weights: set HuggingFaceTokenizer and "
            f"tokenizer_model to a tokenizer that Hugging Face knows"
        )
    tokenizer = load_tokenizer(args.tokenizer_model, f"tokenizer_model={args.tokenizer_model}")
    if len(tokenizer) > rows:
        raise UserError(
            f"the embedding has {rows} rows and the tokenizer {args.tokenizer_model} {len(tokenizer)} tokens: give the "
            f"tokenizer that the run was trained with"
        )
    _refuse_other_tokens(checkpoint, args, rows)
    tokenizer.save_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    return special


def _refuse_other_tokens(checkpoint: Path, args: Namespace, rows: int) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    seen = copy(args)
    with refusals_named("the tokenizer"):
        tokenizer = build_tokenizer(seen)
    seen.padded_vocab_size, seen.tokenizer_digest = rows, tokenizer_digest(args, tokenizer)
    refuse_other_vocabulary(checkpoint, seen)


def _write_card(config: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """Write README.md, which the hub shows: what this is, and how who has transformers alone loads it."""
    what, trust = "plain residual connections", ""
    if recipe.connection is not None:
        what, trust = f"{recipe.connection.description}, and its code", ", trust_remote_code=True"
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"{config['architectures'][0]} with {what}. In this folder:",
        "",
    ]
    lines += ["    from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'    model = AutoModelForCausalLM.from_pretrained("."{trust})']
    lines += [f'    tokenizer = AutoTokenizer.from_pretrained("."{trust})']
    (folder / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def _write_code(config: dict[str, Any], folder: Path) -> None:
    for place in config.get("auto_map", {}).values():
        name = f"{place.partition('.')[0]}.py"
        (folder / name).write_text(resources.files(_CODE).joinpath(name).read_text("utf-8"), "utf-8")
