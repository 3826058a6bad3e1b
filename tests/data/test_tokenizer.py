import os
import socket
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_fc.data import tokenizer as bpe
from megatron_fc.errors import UserError

TEXTS = [f"def function_{n}(value: int) -> str:\n    return str(value + {n})\n" for n in range(200)]
ODD_TEXTS = [
    "plain words",
    "  leading, trailing and  double spaces  ",
    "tabs\tand\r\nline ends\n\n\n",
    "na\u00efve \u6f22\u5b57 \u0391\u03b2 \U0001f389 e\u0301 \u200b\ufeff",
    "x , y . z ' s n't",
    "\x00\x7f",
    "",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return bpe.train(TEXTS, 300)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    (ids,) = bpe.encode(tokenizer, [text])
    return ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decoding_gives_the_text_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(_encode(trained, text), skip_special_tokens=False) == text


def test_training_fills_the_vocabulary_and_learns_merges(trained: Tokenizer) -> None:
    assert trained.get_vocab_size() == 300
    assert len(_encode(trained, TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert bpe.train(iter(TEXTS), 300).to_str() == trained.to_str()


def test_batches_are_encoded_in_order(trained: Tokenizer) -> None:
    texts = TEXTS * 2

    assert list(bpe.encode(trained, iter(texts))) == [_encode(trained, text) for text in texts]


def test_a_text_that_spells_a_special_token_does_not_contain_it(trained: Tokenizer) -> None:
    text = f"print('{bpe.EOD}') # {bpe.PAD}"

    ids = _encode(trained, text)

    assert trained.get_vocab()[bpe.EOD] not in ids
    assert trained.get_vocab()[bpe.PAD] not in ids
    assert trained.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("vocab_size", [-1, 0, 257])
def test_a_vocabulary_without_room_for_every_byte_is_refused(vocab_size: int) -> None:
    with pytest.raises(UserError, match=rf"vocab_size={vocab_size} is too small.*at least 258"):
        bpe.train(TEXTS, vocab_size)


def test_the_smallest_vocabulary_encodes_bytes() -> None:
    tokenizer = bpe.train(TEXTS, bpe.MIN_VOCAB_SIZE)

    assert tokenizer.get_vocab_size() == 258
    assert len(_encode(tokenizer, "\u00e9\U0001f389")) == 6


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(UserError, match=r"vocab_size=100000 is more.*at most \d+") as error:
        bpe.train(TEXTS, 100_000)

    largest = int(str(error.value).split()[-1])
    assert bpe.train(TEXTS, largest).get_vocab_size() == largest


def test_the_callers_setting_of_parallelism_is_respected_and_no_setting_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    parallel = bpe.train(TEXTS, 300)
    assert "TOKENIZERS_PARALLELISM" not in os.environ

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert bpe.train(TEXTS, 300).to_str() == parallel.to_str()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_auto_tokenizer_loads_the_folder_without_a_network(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    bpe.save(trained, tmp_path / "tokenizer")

    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    assert len(loaded) == 300
    assert (loaded.eos_token, loaded.eos_token_id) == (bpe.EOD, trained.get_vocab()[bpe.EOD])
    assert (loaded.pad_token, loaded.pad_token_id) == (bpe.PAD, trained.get_vocab()[bpe.PAD])
    for text in [*TEXTS[:5], *ODD_TEXTS]:
        ids = loaded(text).input_ids
        assert ids == _encode(trained, text)
        assert loaded.decode(ids) == text


def test_saving_twice_gives_the_same_bytes(trained: Tokenizer, tmp_path: Path) -> None:
    bpe.save(trained, tmp_path / "a")
    bpe.save(bpe.train(TEXTS, 300), tmp_path / "b")

    contents = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in "ab"]
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"tokenizer.json", "tokenizer_config.json"}
