"""A byte-level BPE tokenizer that is trained on the corpus and that Megatron loads without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import batched
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_fc.errors import UserError

EOD = "<|endoftext|>"
# Where Megatron keeps the partial last validation sample it pads it and masks that loss by token id, so the
# id must be in no document; without a padding token it crashes there.
PAD = "<|padding|>"
MIN_VOCAB_SIZE = 256 + len((EOD, PAD))

# Enough to keep every core busy; a larger batch only costs memory.
_BATCH_DOCUMENTS = 128


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError unless the vocabulary has room for every byte and the special tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: use at least {MIN_VOCAB_SIZE} "
            f"(256 bytes, {EOD} and {PAD})"
        )


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, the special ones included; the same texts give the same.

    Raises UserError for a vocabulary that is too small, or larger than the texts can fill.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _parallel():
        tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is more than this corpus can fill: use at most {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of each text, in order and without an eod.

    A text that spells out a special token gets its characters, not the special token: a source file that
    mentions the eod must not end there.
    """
    tokenizer.encode_special_tokens = True
    for batch in batched(texts, _BATCH_DOCUMENTS):
        with _parallel():
            encodings = tokenizer.encode_batch_fast(list(batch), add_special_tokens=False)
        for encoding in encodings:
            yield encoding.ids


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the new folder that `AutoTokenizer.from_pretrained` (Megatron's HuggingFaceTokenizer) loads."""
    folder.mkdir()
    config = {
        # The class that takes tokenizer.json as it is; a model's own class may rebuild its parts.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _parallel() -> Iterator[None]:
    """Lets `tokenizers` use every core here unless the user decided otherwise.

    The variable is taken back: left on, it would switch off the library's protection of forked children
    (Megatron's data loaders) against deadlocks.
    """
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]
