"""Prompts for the tiny models, and a tokenizer of numbers."""

from pathlib import Path
from typing import Any

from support import tiny

PROMPTS = ([5, 17, 93, 4, 66], [120, 3, 3, 41, 8, 77, 12])  # of two lengths: the engine forces the longer one's rest
NEW = 6


def write_tokenizer(folder: Path) -> None:
    """A tokenizer for transformers whose tokens are the numbers below `tiny.VOCABULARY`, the last two special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end, pad = str(tiny.VOCABULARY - 2), str(tiny.VOCABULARY - 1)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad).save_pretrained(folder)


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    eod, bos, vocab_size = -1, 0, tiny.VOCABULARY

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))
