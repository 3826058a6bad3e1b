"""Prompts for the tiny models, and a tokenizer of numbers."""

from typing import Any

from support import tiny

PROMPTS = ([5, 17, 93, 4, 66], [120, 3, 3, 41, 8, 77, 12])  # of two lengths: the engine forces the longer one's rest
NEW = 6


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    eod, bos, vocab_size = -1, 0, tiny.VOCABULARY

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))
