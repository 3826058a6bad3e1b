"""A tokenizer's digest: its first half is that of checkpoints of 0.2.0, and every token's number counts."""

import hashlib
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from megatron_fc.training.tokenizer_digest import _TEXT, tokenizer_digest

TOKENS = {0: "a", 1: "b", 2: "never in the text"}


def digest(tokens: dict[int, str] | None, kind: str = "HuggingFaceTokenizer") -> Any:
    listed = {} if tokens is None else {"inv_vocab": tokens}
    tokenizer = SimpleNamespace(vocab_size=3, tokenize=lambda text: [len(text), 0], **listed)
    return tokenizer_digest(Namespace(tokenizer_type=kind), tokenizer)


def test_every_token_counts() -> None:
    first = hashlib.sha256(str([3, len(_TEXT), 0]).encode()).hexdigest()[:16]
    assert digest(None) == first
    assert digest(TOKENS).startswith(first)
    assert digest(dict(reversed(TOKENS.items()))) == digest(TOKENS)
    others = [digest({**TOKENS, 2: "another"}), digest({0: TOKENS[2], 1: "b", 2: "a"}), digest(None)]
    assert len({digest(TOKENS), *others}) == 4
    assert digest(TOKENS, "NullTokenizer") is None
