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
    """Return two digests in one, None for a tokenizer that reads no text: of what a text becomes, and of all tokens.

    The first 16 digits are of the vocabulary's size and of a text's tokens, and are all that checkpoints of version
    0.2.0 have. The other 16 are of the tokens by number; a tokenizer that cannot list them, such as that of bytes, has
    none.

    Args:
        args: Megatron's.
        tokenizer: as Megatron has built it.
    """
    if args.tokenizer_type.startswith("Null"):
        return None
    first = _digest([tokenizer.vocab_size, *map(int, tokenizer.tokenize(_TEXT))])
    tokens = getattr(tokenizer, "inv_vocab", None)
    return first + _digest(sorted(tokens.items())) if isinstance(tokens, dict) else first


def _digest(seen: list[Any]) -> str:
    return hashlib.sha256(str(seen).encode()).hexdigest()[:16]
