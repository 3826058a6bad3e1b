from pathlib import Path

import numpy as np
import pytest

from megatron_fc.data.indexed import write_indexed
from megatron_fc.data.look import look_at_document, look_at_sample
from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import load_tokenizer
from support.documents import make, save_tokenizer, texts, write_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("look")
    write_documents(root / "a.jsonl", texts(60, longest=6))
    make([root / "a.jsonl"], root / "out", save_tokenizer(root / "small"))
    return root / "out"


def test_a_document_is_its_text(made: Path) -> None:
    tokenizer = load_tokenizer(made / "tokenizer", "the tokenizer")
    header, text = look_at_document(made / "train-00000", 7, tokenizer)
    assert text == texts(60, longest=6)[7] + "<|endoftext|>"
    assert header.startswith(f"document 7 of {made / 'train-00000'}: ")
    with pytest.raises(UserError, match=r"--document=60: .* has 60 documents, from 0 on"):
        look_at_document(made / "train-00000", 60, tokenizer)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_is_whole_documents_with_their_ends(made: Path, masked: bool) -> None:
    before = sorted(made.rglob("*"))
    settings = {"sequence_length": 128, "seed": 5, "eod_mask_loss": masked, "reset_position_ids": masked}
    lines = look_at_sample(made / "train-00000", 2, load_tokenizer(made / "tokenizer", "the tokenizer"), **settings)

    pieces = [line.removesuffix("<|endoftext|>") for line in lines[2::2]]
    assert set(pieces[1:-1]) <= set(texts(60, longest=6))
    assert len(pieces) > 3
    ends = sum(line.endswith("<|endoftext|>") for line in lines[2::2])
    assert f"128 tokens, {ends} ends of text, {128 - ends * masked} in the loss" in lines[0]
    assert all(("positions 0 to" in line) == masked for line in lines[3::2])
    assert sorted(made.rglob("*")) == before, "a look leaves nothing, e.g. an index that a run would take"


def test_what_is_not_there_is_refused(made: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made / "tokenizer", "the tokenizer")
    with pytest.raises(UserError, match=r"--sample=9999: .* has \d+ samples of 16, from 0 on"):
        look_at_sample(made / "train-00000", 9999, tokenizer, sequence_length=16, seed=1)
    with pytest.raises(UserError, match="--seq-length=0: give 1 or more"):
        look_at_sample(made / "train-00000", 0, tokenizer, sequence_length=0, seed=1)
    write_indexed(tmp_path / "short", [np.arange(5).tolist()], 300, eod=0)
    with pytest.raises(UserError, match="has 6 tokens, and a sample takes 16 and one more"):
        look_at_sample(tmp_path / "short", 0, tokenizer, sequence_length=16, seed=1)
    with pytest.raises(UserError, match=r"the tokenizer cannot be loaded: the folder has no tokenizer\.json"):
        load_tokenizer(tmp_path, "the tokenizer")
