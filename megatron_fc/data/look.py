"""`megatron-fc data look`: a document, or a sample as Megatron feeds it to a rank, decoded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_fc.errors import UserError
from megatron_fc.training.indexed_files import IndexedFiles


def document_text(prefix: Path, number: int, tokenizer: Any) -> str:
    """Return a document, special tokens as they are written.

    Raises:
        UserError: the files are damaged, or have no document of this number.
    """
    ids = _document(prefix, number)
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def look_at_document(prefix: Path, number: int, tokenizer: Any) -> list[str]:
    """Return the lines of a document, with its size."""
    ids = _document(prefix, number)
    return [f"document {number:,} of {prefix}: {ids.size:,} tokens", document_text(prefix, number, tokenizer)]


def look_at_sample(
    prefix: Path,
    number: int,
    tokenizer: Any,
    *,
    sequence_length: int,
    seed: int,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
) -> list[str]:
    """Return the lines of a sample of Megatron's data set over these files alone, one per piece between ends of text.

    Args:
        number: of the sample in the shuffled order of `seed`.
        sequence_length, eod_mask_loss, reset_position_ids: as in a config.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    if sequence_length < 1:
        raise UserError(f"--seq-length={sequence_length}: give 1 or more")
    files = IndexedFiles.read(str(prefix), str(prefix))
    if files.tokens <= sequence_length:
        raise UserError(f"{prefix} has {files.tokens:,} tokens, and a sample takes {sequence_length:,} and one more")
    eod = tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as cache:  # beside the data it would be taken for a run's
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([str(prefix)], None),
            split="1",
            path_to_cache=cache,
            tokenizer=SimpleNamespace(eod=eod, pad=-1, vocab_size=len(tokenizer), unique_identifiers={}),
            reset_position_ids=reset_position_ids,
            reset_attention_mask=False,
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=False,
        )
        everything = np.arange(files.sequences, dtype=np.int32)
        data = GPTDataset(IndexedDataset(str(prefix)), str(prefix), everything, None, Split.train, config)
        if not 0 <= number < len(data):
            raise UserError(f"--sample={number}: {prefix} has {len(data):,} samples of {sequence_length:,}, from 0 on")
        sample = data[number]
        tokens, mask, positions = (sample[name].numpy() for name in ("tokens", "loss_mask", "position_ids"))
        header = f"sample {number:,} of {len(data):,} with seed {seed}: {tokens.size:,} tokens"
    ends = np.flatnonzero(tokens == eod) + 1
    lines = [f"{header}, {len(ends):,} ends of text, {int(mask.sum()):,} in the loss"]
    for begin, end in zip([0, *ends], [*ends, tokens.size], strict=True):
        if begin < end:
            lines.append(
                f"-- tokens {begin:,} to {end - 1:,}, positions {positions[begin]:,} to {positions[end - 1]:,}, "
                f"{int(mask[begin:end].sum()):,} of {end - begin:,} in the loss"
            )
            lines.append(str(tokenizer.decode(tokens[begin:end].tolist(), clean_up_tokenization_spaces=False)))
    return lines


def _document(prefix: Path, number: int) -> np.ndarray[Any, Any]:
    files = IndexedFiles.read(str(prefix), str(prefix))
    if not 0 <= number < files.sequences:
        raise UserError(f"--document={number}: {prefix} has {files.sequences:,} documents, from 0 on")
    return files.sequence(number)
