"""Size of the vocabulary: Megatron's own tokenizers decide, and a `vocab_size` that it would not read is said."""

from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.vocabulary import unread_vocabulary, vocabulary_of
from support.documents import save_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", 300)


def parse(*flags: str) -> Namespace:
    args = megatron_arguments().parse(list(flags))
    args.rank = 0  # Megatron's validation sets it
    return args


@pytest.mark.parametrize(
    ("flags", "rows", "said"),
    [
        ([], 384, None),
        (["--vocab-size", "300"], 384, None),
        (["--vocab-size", "400"], 384, "vocab_size=400 is not read: the tokenizer has 300 tokens, and the model's voc"),
        (["--vocab-size", "400", "--padded-vocab-size", "512"], 512, "and the model's vocabulary 512; padded_vocab_si"),
        (["--vocab-size", "400", "--no-pad-vocab-size"], 400, None),
    ],
)
def test_vocabulary_of_a_tokenizer_with_its_own(small: Path, flags: list[str], rows: int, said: str | None) -> None:
    args = parse("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(small), *flags)
    assert vocabulary_of(args) == rows
    tokenizer = build_tokenizer(args)
    found = unread_vocabulary(args, tokenizer)
    assert found is None if said is None else found is not None and said in found


def test_vocabulary_that_is_given() -> None:
    args = parse("--tokenizer-type", "NullTokenizer", "--vocab-size", "300")
    assert vocabulary_of(args) == 384
    assert unread_vocabulary(args, build_tokenizer(args)) is None
