"""A digest of what a tokenizer does, by which a run finds out that it has got another one.

Files do not tell: the same tokenizer may lie in another folder, or be written by another version of its library.
"""

import hashlib
from argparse import Namespace
from typing import Any

_TEXT = (
    "The quick brown fox jumps over 13 lazy dogs; def f(x): return {x: [x**2, 0.5e-3]}  # a_b-c\n\tif not x:\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Съешь же ещё этих мягких французских булок. "
    "我能吞下玻璃而不伤身体。 いろはにほへと ‽ 🙂 https://example.org/?q=1&r=%20 \\frac{\\partial L}{\\partial w}"
)


def tokenizer_digest(args: Namespace, tokenizer: Any) -> str | None:
    """Return the digest of the vocabulary's size and of a text's tokens, None for a tokenizer that reads no text.

    Args:
        args: Megatron's.
        tokenizer: as Megatron has built it.
    """
    if args.tokenizer_type.startswith("Null"):
        return None
    seen = [tokenizer.vocab_size, *map(int, tokenizer.tokenize(_TEXT))]
    return hashlib.sha256(str(seen).encode()).hexdigest()[:16]
