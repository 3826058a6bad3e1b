"""The files that a run reads, data and tokenizer: whether they are here, and what they say themselves to be."""

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import is_hub_name, load_tokenizer, refuse_tokenizer_out_of_reach
from megatron_fc.training.indexed_files import IndexedFiles, missing
from megatron_fc.training.manifests import manifest_of, refuse_other_sizes, tokenizer_hash
from megatron_fc.training.refusal import refusals_named
from megatron_fc.training.vocabulary import vocabulary_of

_SPLITS = ("train", "valid", "test")
_DATA_KEYS = ("data_path", *(f"{split}_data_path" for split in _SPLITS))
_DEFAULT_SPLIT = "969, 30, 1"  # Megatron's
_EPOCHS = 4  # the default limit of `data blend`
# Options of Megatron's that take for granted what `megatron-fc data index` makes.
OF_A_PREPARED_INDEX = ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap")


@dataclass(frozen=True)
class Blend:
    """Data sets that are drawn from together.

    Attributes:
        setting: that names them.
        prefixes: of their files.
        weights: shares of the samples, None where the sizes of the data sets are the shares.
        file: that `per_split_data_args_path` names, where it stands in the place of the setting.
    """

    setting: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    file: str | None = None

    def named(self, prefix: str) -> str:
        """Return what a user has written, e.g. `train_data_path=/data/train`."""
        if self.file is None:
            return f"{self.setting}={prefix}"
        return f"per_split_data_args_path={self.file}, {self.setting.partition('_')[0]} {prefix}"


def blends(args: argparse.Namespace) -> list[Blend]:
    """Return what Megatron will read, a blend per setting.

    Raises:
        UserError: weights are not those of a blend, or a file that lists data cannot be read.
    """
    refuse_two_sources(args)
    words, file = {name: getattr(args, name) for name in _DATA_KEYS}, args.per_split_data_args_path
    if args.data_args_path:
        words = {"data_args_path": _text(args.data_args_path, "data_args_path").split()}
    elif file:
        words = _per_split(file)
    return [_blend(setting, listed, file) for setting, listed in words.items() if listed]


def refuse_two_sources(args: argparse.Namespace) -> None:
    """Check that one setting names the data of a split, whether they are here or not.

    Raises:
        UserError: two do.
    """
    whole = [name for name in ("data_path", "data_args_path") if getattr(args, name)]
    paths = [name for name in _DATA_KEYS[1:] if getattr(args, name)]
    of_splits = ["per_split_data_args_path"] * bool(args.per_split_data_args_path) + paths
    if len(whole) > 1:
        raise UserError("data_path and data_args_path are both set: keep one, by data_path=null or data_args_path=null")
    if whole and of_splits:
        raise UserError(
            f"{whole[0]} is for all splits, and Megatron would not read {', '.join(of_splits)}: remove the latter "
            f"by {_unset(of_splits)}, or the former by {_unset(whole)}"
        )
    if args.per_split_data_args_path and paths:
        raise UserError(
            f"per_split_data_args_path and {' and '.join(paths)} are both set: remove the latter, e.g. from "
            f"SITE_OVERRIDES, or by {_unset(paths)}"
        )


def _unset(names: Sequence[str]) -> str:
    return " ".join(f"{name}=null" for name in names)


def data_files(args: argparse.Namespace) -> dict[Path, str]:
    """Return the files that a run reads, data and tokenizer, each with the setting that names it."""
    files = {
        Path(prefix + suffix): blend.named(prefix)
        for blend in blends(args)
        for prefix in blend.prefixes
        for suffix in (".bin", ".idx")
    }
    tokenizer = args.tokenizer_model
    if tokenizer and not is_hub_name(tokenizer):
        files[Path(tokenizer)] = f"tokenizer_model={tokenizer}"
    return files


def indexed_files(args: argparse.Namespace) -> list[IndexedFiles]:
    """Return a run's data sets, each once, their sizes checked.

    Raises:
        UserError: one is missing or damaged.
    """
    settings = {prefix: blend.named(prefix) for blend in blends(args) for prefix in blend.prefixes}
    return [IndexedFiles.read(prefix, setting) for prefix, setting in settings.items()]


def refuse_missing_files(args: argparse.Namespace) -> None:
    """Check that a run's data and tokenizer are here, at a cost that does not grow with the data.

    Raises:
        UserError: a file is missing or cut, a blend is none, no data are named, a prepared index has no place, or a
            tokenizer's name on the hub leads nowhere.
    """
    _refuse_index_without_place(args)
    for file, setting in data_files(args).items():
        if not file.exists():
            raise missing(file, setting)
    for files in indexed_files(args):
        if args.data_path or args.data_args_path:
            _refuse_empty_split(files, args.split)
    if not args.mock_data and not blends(args):
        raise UserError("no data: set data_path, or train_data_path and valid_data_path")
    if not args.mock_data:
        refuse_tokenizer_out_of_reach(args)


def _refuse_index_without_place(args: argparse.Namespace) -> None:
    for name in OF_A_PREPARED_INDEX:
        if getattr(args, name) and (args.mock_data or args.data_cache_path is None):
            raise UserError(
                f"{name} reads what `megatron-fc data index` has made: "
                + ("drop it with mock_data" if args.mock_data else "set data_cache_path to its folder")
            )
    if args.dataloader_fast_cache_load and (args.data_path or args.data_args_path):
        raise UserError(
            "dataloader_fast_cache_load does not divide data_path into splits: set train_data_path and "
            "valid_data_path, or per_split_data_args_path"
        )


def refuse_damaged_files(args: argparse.Namespace, *, remember: bool = False) -> None:
    """Read a run's indexes, and tokens of its data, for those that cannot be; one rank does it for all.

    Args:
        args: Megatron's, validated.
        remember: note beside Megatron's indexes which files were right, and do not read these again.

    Raises:
        UserError: an index is damaged, or tokens are not of the model's vocabulary.
    """
    vocabulary = vocabulary_of(args)
    _refuse_other_manifests(args, vocabulary)
    for files in indexed_files(args):
        note = index_folder(args, files.prefix) / f"{files.fingerprint(vocabulary)}.checked"
        if not note.exists():
            files.refuse_damage(vocabulary)
            if remember:
                with suppress(OSError):
                    note.parent.mkdir(parents=True, exist_ok=True)
                    note.touch()


def _refuse_other_manifests(args: argparse.Namespace, vocabulary: int | None) -> None:
    """Compare the manifests beside a run's data with its files, its tokenizer and its model."""
    hashed: dict[str, str] = {}
    for blend in blends(args):
        for prefix in blend.prefixes:
            if (found := manifest_of(prefix)) is None:
                continue
            manifest, file = found
            setting, made = blend.named(prefix), manifest["tokenizer"]
            refuse_other_sizes(prefix, file)
            if args.tokenizer_type == "HuggingFaceTokenizer":
                name = args.tokenizer_model
                if name not in hashed:
                    hashed[name] = tokenizer_hash(load_tokenizer(name, f"tokenizer_model={name}"))
                if hashed[name] != made["sha256"]:
                    raise UserError(
                        f"{setting}: the tokenizer {made['name']} made these data, and tokenizer_model={name} is "
                        f"another one: give {Path(prefix).parent / 'tokenizer'}"
                    )
            if vocabulary is not None and made["vocabulary"] > vocabulary:
                least = made["vocabulary"]
                rows = "padded_vocab_size" if args.vocab_size is None else "vocab_size"
                raise UserError(
                    f"{setting}: the tokenizer {made['name']} that made these data has {least:,} tokens, and the "
                    f"model's vocabulary {vocabulary:,}: set {rows} to at least {least}"
                )


def index_folder(args: argparse.Namespace, prefix: str) -> Path:
    """Where Megatron keeps the order of a data set's samples."""
    return Path(args.data_cache_path or Path(prefix) / "cache" / "TokenDataset_indices")


def repetition(args: argparse.Namespace) -> str | None:
    """Say how often a run reads its training data, None where it reads no token twice; a WARNING of more than 4 times.

    Args:
        args: Megatron's, parsed.
    """
    samples = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    blend = next((b for b in blends(args) if b.setting in ("data_path", "data_args_path", "train_data_path")), None)
    if not samples or blend is None or not args.seq_length:
        return None
    begin, end = (0.0, 1.0) if blend.setting == "train_data_path" else _shares(args.split)[0] or (0.0, 0.0)
    if begin == end:
        return None
    tokens = [IndexedFiles.read(prefix, blend.named(prefix)).tokens * (end - begin) for prefix in blend.prefixes]
    if blend.weights is None and len(tokens) > 1 and args.dataloader_type != "cyclic":
        once = sum(int(count - 1) // args.seq_length for count in tokens)  # Megatron ends where they do, in mid-run
        if samples > once:
            raise UserError(
                f"{blend.setting} without weights has {once:,} samples of {args.seq_length:,} tokens for training, and "
                f"the run takes {samples:,}: give each data set a weight, then they repeat, or train for fewer"
            )
    weights = blend.weights or tokens
    epochs, prefix = max(
        (samples * args.seq_length * weight / sum(weights) / count, prefix)
        for weight, count, prefix in zip(weights, tokens, blend.prefixes, strict=True)
    )
    if epochs <= 1:
        return None
    said = f"the run reads {prefix} {epochs:,.2f} times over"
    length = "train_samples" if args.train_samples else "train_iters"
    return said if epochs <= _EPOCHS else f"WARNING: {said}, more than {_EPOCHS}: add data, or set a smaller {length}"


def _shares(split: str | None) -> list[tuple[float, float] | None]:
    """Where training, validation and test begin and end in the data, None for one that has none of them."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    with refusals_named(f"split={split}"):
        return list(convert_split_vector_to_split_matrix(parse_and_normalize_split(split or _DEFAULT_SPLIT)))


def _refuse_empty_split(files: IndexedFiles, split: str | None) -> None:
    """Of one without a token Megatron would read the end for ever."""
    for name, share in zip(_SPLITS, _shares(split), strict=True):
        if share and files.is_empty(*(round(bound * files.sequences) for bound in share)):
            raise UserError(
                f"{files.setting}: split={split or _DEFAULT_SPLIT} leaves {name} nothing of {files.sequences:,} "
                f"sequences: give it more, or 0"
            )


def _blend(setting: str, words: Sequence[str], file: str | None) -> Blend:
    from megatron.core.datasets.utils import get_blend_from_list

    try:
        prefixes, weights = get_blend_from_list([str(word) for word in words])
    except AssertionError:
        raise _half_weighted(setting, words) from None
    if weights is None and any(_is_number(prefix) and not Path(f"{prefix}.idx").exists() for prefix in prefixes):
        raise _half_weighted(setting, words)
    for prefix, weight in zip(prefixes, weights or (), strict=bool(weights)):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"{setting}: the weight of {prefix} is {weight:g}, and must be a number above 0: leave the data set out"
            )
    return Blend(setting, tuple(prefixes), tuple(weights) if weights else None, file)


def _half_weighted(setting: str, words: Sequence[str]) -> UserError:
    return UserError(f"{setting}={' '.join(map(str, words))}: give every data set a weight before it, or none")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _per_split(path: str) -> dict[str, list[str]]:
    text = _text(path, "per_split_data_args_path")
    try:
        content = json.loads(text)
        listed = {split: content[split] for split in _SPLITS}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"per_split_data_args_path={path} must be JSON with the keys {', '.join(_SPLITS)}, each a list of prefixes"
        ) from None
    return {
        f"{split}_data_path": words.split() if isinstance(words, str) else words or []
        for split, words in listed.items()
    }


def _text(path: str, setting: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
