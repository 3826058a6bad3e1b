"""OLMoE's filters (arXiv 2409.02060): documents that repeat themselves, and code that few like or that is no code.

Each drops documents when the data are made; none is on unless it is asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_fc.errors import UserError
from megatron_fc.training.repetitions import MAX_PERIOD, MIN_REPETITIONS, repeats

FILTER_KINDS = {
    "repetition": f"1 to {MAX_PERIOD} tokens repeated {MIN_REPETITIONS} times or more",
    "stars": "a repository with too few stars",
    "one_word": "one word too frequent",
    "two_words": "two words too frequent",
}


@dataclass(frozen=True)
class Filters:
    """Which documents are dropped.

    Attributes:
        repetitions: those in which 1 to 13 tokens stand 32 times or more in a row.
        min_stars: those whose `stars_field` is below it, or missing; 0: none.
        stars_field: of a document, a number; StarCoder's by default.
        max_word, max_two_words: those in which the most frequent word, or the two most frequent, are a larger share of
            the words, which white space separates; 1: none. OLMoE: 0.3 and 0.5.
    """

    repetitions: bool = False
    min_stars: int = 0
    stars_field: str = "max_stars_count"
    max_word: float = 1.0
    max_two_words: float = 1.0

    def __post_init__(self) -> None:
        for option, share in (("--max-word", self.max_word), ("--max-two-words", self.max_two_words)):
            if not 0 < share <= 1:
                raise UserError(f"{option}={share:g}: give a share of the words above 0 and up to 1")
        if self.min_stars < 0:
            raise UserError(f"--min-stars={self.min_stars}: give 0 or more")

    @property
    def fields(self) -> tuple[str, ...]:
        """What they read beside the text."""
        return (self.stars_field,) if self.min_stars else ()

    def of_text(self, text: str, fields: dict[str, Any]) -> str | None:
        """Return which of FILTER_KINDS drops a document, None where it stays."""
        if self.min_stars:
            stars = fields.get(self.stars_field)
            if not isinstance(stars, (int, float)) or stars < self.min_stars:
                return "stars"
        if self.max_word < 1 or self.max_two_words < 1:
            words = Counter(text.split())
            most = [count for _, count in words.most_common(2)]
            if most and most[0] > self.max_word * words.total():
                return "one_word"
            if sum(most) > self.max_two_words * words.total():
                return "two_words"
        return None

    def of_tokens(self, ids: np.ndarray[Any, Any]) -> str | None:
        """Return which of FILTER_KINDS drops a document by its tokens, None where it stays."""
        return "repetition" if self.repetitions and repeats(ids) else None
