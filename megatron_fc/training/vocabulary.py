"""Size of the model's vocabulary: what the arguments say, and what the tokenizer does."""

import copy
from argparse import Namespace
from typing import Any

from megatron_fc.training.refusal import refusals_named

# Megatron builds them with `vocab_size`; all others have a vocabulary of their own.
_OF_GIVEN_SIZE = ("NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer")


def vocabulary_of(args: Namespace) -> int | None:
    """Return the rows of the model's embedding; where the arguments do not say, the tokenizer is asked.

    Raises:
        UserError: Megatron cannot build the tokenizer.
    """
    if args.padded_vocab_size is not None:
        return int(args.padded_vocab_size)
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    known = copy.copy(args)
    with refusals_named("the tokenizer"):
        build_tokenizer(known)
    return known.padded_vocab_size or known.vocab_size


def unread_vocabulary(args: Namespace, tokenizer: Any) -> str | None:
    """Say that `vocab_size` is not the model's, in words; None where it is, or is not set.

    Megatron takes the size of the tokenizer, if that has a vocabulary of its own, and does not compare.

    Args:
        args: Megatron's, once it has built the tokenizer.
        tokenizer: as Megatron has built it.
    """
    if args.vocab_size in (None, tokenizer.vocab_size) or args.tokenizer_type in _OF_GIVEN_SIZE:
        return None
    if not args.pad_vocab_size:
        return None
    return (
        f"vocab_size={args.vocab_size} is not read: the tokenizer has {tokenizer.vocab_size:,} tokens, and the model's "
        f"vocabulary {args.padded_vocab_size:,}; padded_vocab_size sets it"
    )
