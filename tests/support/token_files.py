"""Small data sets in Megatron's indexed format."""

from pathlib import Path

import numpy as np

from megatron_fc.data.indexed import write_indexed


def write_tokens(prefix: Path, vocabulary: int = 300, sequences: int = 40, seed: int = 0) -> Path:
    """Write sequences of 5 to 60 random tokens; returns the prefix."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, vocabulary - 1, random.integers(5, 60)).tolist() for _ in range(sequences)]
    write_indexed(prefix, documents, vocabulary, eod=vocabulary - 1)
    return prefix
