"""Data that `megatron-fc data tokenize` made: a run refuses another tokenizer, vocabulary or other files."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_fc.errors import UserError
from megatron_fc.training.data_files import refuse_damaged_files
from support.documents import make, save_tokenizer, texts, write_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    save_tokenizer(root / "other", 320)
    write_documents(root / "a.jsonl", texts(40))
    make([root / "a.jsonl"], root / "data", save_tokenizer(root / "small"))
    return root


def look(made: Path, **settings: Any) -> None:
    named = {"data_path": None, "valid_data_path": None, "test_data_path": None, "data_args_path": None}
    named |= {"per_split_data_args_path": None, "data_cache_path": None, "tokenizer_type": "HuggingFaceTokenizer"}
    named |= {"train_data_path": [str(made / "data" / "train-00000")], "padded_vocab_size": 384, "vocab_size": None}
    refuse_damaged_files(Namespace(**named | settings))


def test_the_tokenizer_that_made_them_is_taken(made: Path) -> None:
    look(made, tokenizer_model=str(made / "small"))
    look(made, tokenizer_model=str(made / "data" / "tokenizer"))
    look(made, tokenizer_type="NullTokenizer", tokenizer_model=None)


def test_another_one_is_refused(made: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer small made these data, and tokenizer_model=\S+/other is "):
        look(made, tokenizer_model=str(made / "other"))


def test_a_smaller_vocabulary_is_refused(made: Path) -> None:
    said = "the tokenizer small that made these data has 300 tokens, and the model's vocabulary 299: set "
    with pytest.raises(UserError, match=f"{said}padded_vocab_size to at least 300"):
        look(made, tokenizer_model=str(made / "small"), padded_vocab_size=299)
    with pytest.raises(UserError, match=f"{said}vocab_size to at least 300"):
        look(made, tokenizer_type="NullTokenizer", tokenizer_model=None, padded_vocab_size=299, vocab_size=299)


def test_files_that_are_not_those_of_the_manifest_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    write_documents(tmp_path / "b.jsonl", texts(30))
    make([tmp_path / "b.jsonl"], tmp_path / "b", made / "small")
    for kind in ("bin", "idx"):
        shutil.copy(tmp_path / "b" / f"train-00000.{kind}", tmp_path / "data")
    with pytest.raises(UserError, match=r"train-00000\.bin has .* bytes, and .* by manifest\.json beside it"):
        look(tmp_path, tokenizer_model=str(made / "small"))
    (tmp_path / "data" / "manifest.json").write_text('{"builder": "megatron-fc data tokenize"}')
    with pytest.raises(UserError, match=r"the manifest \S+ lacks entries"):
        look(tmp_path, tokenizer_model=str(made / "small"))
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"the manifest \S+ cannot be read"):
        look(tmp_path, tokenizer_model=str(made / "small"))
