"""Samples of tokens: from the files that are there now, and never a token that the model does not have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from torch.utils.data import DataLoader

from megatron_fc.data.indexed import write_indexed
from megatron_fc.errors import UserError
from megatron_fc.training.indexed_files import IndexedFiles
from megatron_fc.training.token_data import ForeignTokenError, TokenDataConfig, TokenDataset, TokenErrors
from support.token_files import write_tokens


def dataset(
    prefixes: list[Path], samples: int, cache: Path, vocabulary: int = 300, masks: bool = False, length: int = 16
) -> Any:
    names = [str(prefix) for prefix in prefixes]
    weights = [1.0 + i for i in range(len(names))] if len(names) > 1 else None
    settings = TokenDataConfig(
        random_seed=1,
        sequence_length=length,
        blend_per_split=[(names, weights), None, None],
        path_to_cache=str(cache),
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=vocabulary),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        vocabulary=vocabulary,
        mask_repetitions=masks,
        versions={name: IndexedFiles.read(name, "data_path").version for name in names},
    )
    return BlendedMegatronDatasetBuilder(TokenDataset, [samples, 0, 0], lambda: True, settings).build()[0]


def tokens(data: Any) -> set[int]:
    return {int(token) for i in range(len(data)) for token in data[i]["tokens"]}


@pytest.mark.parametrize("blended", [False, True])
def test_data_replaced_at_their_path_are_read(tmp_path: Path, blended: bool) -> None:
    """Megatron's caches, of one data set and of a blend, are keyed by path."""
    prefixes = [write_tokens(tmp_path / "data", vocabulary=100, sequences=200)]
    prefixes += [write_tokens(tmp_path / "more", vocabulary=100)] * blended
    first = dataset(prefixes, 30, tmp_path / "cache")
    files = set((tmp_path / "cache").iterdir())
    again = dataset(prefixes, 30, tmp_path / "cache")
    assert set((tmp_path / "cache").iterdir()) == files, "files that stay keep their cache"
    assert all(torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in range(30))
    del first, again
    # A tenth of the sequences: indexes of the old files would point behind the end of the new ones.
    write_tokens(prefixes[0], vocabulary=290, sequences=20, seed=3)
    replaced = dataset(prefixes, 30, tmp_path / "cache")
    assert max(tokens(replaced)) >= 100
    assert set((tmp_path / "cache").iterdir()) > files


@pytest.mark.parametrize("workers", [0, 1])
def test_a_foreign_token_ends_the_run_in_a_sentence(tmp_path: Path, workers: int) -> None:
    """The look at the start reads large data in places only."""
    data = dataset([write_tokens(tmp_path / "data", sequences=400)], 200, tmp_path / "cache", vocabulary=298)
    with pytest.raises(ForeignTokenError) as met:
        list(DataLoader(data, num_workers=workers))
    error = TokenErrors().failed(met.value)
    assert isinstance(error, UserError)
    assert str(error).startswith("sample ")
    assert f" of {tmp_path}/data has the token 29" in str(error)
    assert str(error).endswith(
        ", and the model's vocabulary has 298: give the tokenizer that made these data, or make them again"
    )
    assert "\n" not in str(error)
    assert TokenErrors().failed(other := RuntimeError("x")) is other


def test_samples_that_repeat_themselves_are_masked(tmp_path: Path) -> None:
    documents = [[5] * 400 if number % 2 else list(range(1, 200)) for number in range(20)]
    write_indexed(tmp_path / "data", documents, 300, eod=0)
    settings = {"length": 64, "vocabulary": 300}
    plain = dataset([tmp_path / "data"], 50, tmp_path / "cache", **settings)
    masked = dataset([tmp_path / "data"], 50, tmp_path / "cache", masks=True, **settings)
    dropped = 0
    for number in range(50):
        seen = torch.cat((masked[number]["tokens"], masked[number]["labels"][-1:])).tolist()
        fives = max(len(run) for run in "".join("5" if token == 5 else " " for token in seen).split(" "))
        assert bool(masked[number]["loss_mask"].any()) == (fives < 32), seen
        assert plain[number]["loss_mask"].all()
        assert torch.equal(plain[number]["tokens"], masked[number]["tokens"])
        dropped += fives >= 32
    assert 10 < dropped < 50
