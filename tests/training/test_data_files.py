"""Blends and splits of data, and how often a run reads them."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_fc.errors import UserError
from megatron_fc.training.data_files import (
    OF_A_PREPARED_INDEX,
    Blend,
    blends,
    refuse_damaged_files,
    refuse_missing_files,
    repetition,
)
from megatron_fc.training.token_data import TokenDataset
from support.token_files import write_tokens


def arguments(**settings: Any) -> Namespace:
    names = ["data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "split"]
    names += ["per_split_data_args_path", "tokenizer_model", "train_samples", "train_iters", "dataloader_type"]
    unset = {**dict.fromkeys([*names, "data_cache_path"]), **dict.fromkeys(OF_A_PREPARED_INDEX, False)}
    return Namespace(**{**unset, "mock_data": False, "seq_length": 16, "global_batch_size": 4, **settings})


def test_what_a_blend_is(tmp_path: Path) -> None:
    assert blends(arguments(train_data_path=["a"], valid_data_path=["3", "b", "1e0", "c"])) == [
        Blend("train_data_path", ("a",), None),
        Blend("valid_data_path", ("b", "c"), (3.0, 1.0)),
    ]
    (tmp_path / "list").write_text("0.5 a\n0.5 b\n")
    assert blends(arguments(data_args_path=str(tmp_path / "list"))) == [Blend("data_args_path", ("a", "b"), (0.5, 0.5))]
    (tmp_path / "json").write_text('{"train": ["a"], "valid": "b c", "test": null}')
    assert blends(arguments(per_split_data_args_path=str(tmp_path / "json"))) == [
        Blend("train_data_path", ("a",), None, str(tmp_path / "json")),
        Blend("valid_data_path", ("b", "c"), None, str(tmp_path / "json")),
    ]
    with pytest.raises(UserError, match=r"^per_split_data_args_path=\S+/json, train a: a.bin does not exist: correct "):
        refuse_missing_files(arguments(per_split_data_args_path=str(tmp_path / "json")))
    with pytest.raises(UserError, match=r"^train_data_path=data/demo/no: .* exist: `megatron-fc data demo` makes it"):
        refuse_missing_files(arguments(train_data_path=["data/demo/no"]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data_path": ["0", "a", "1", "b"]}, "data_path: the weight of a is 0, and must be a number above 0"),
        ({"data_path": ["1", "a", "-1", "b"]}, "data_path: the weight of b is -1, and must be"),
        ({"data_path": ["nan", "a"]}, "data_path: the weight of a is nan, and must be"),
        ({"data_path": ["inf", "a"]}, "data_path: the weight of a is inf, and must be"),
        ({"data_path": ["0.5", "a", "b", "c"]}, "data_path=0.5 a b c: give every data set a weight before it, or none"),
        ({"data_path": ["0.5", "a", "b"]}, "data_path=0.5 a b: give every data set a weight before it, or none"),
        (
            {"data_path": ["a"], "train_data_path": ["b"], "valid_data_path": ["b"]},
            "data_path is for all splits, and Megatron would not read train_data_path, valid_data_path: remove the "
            "latter by train_data_path=null valid_data_path=null, or the former by data_path=null",
        ),
        (
            {"data_args_path": "x", "per_split_data_args_path": "y"},
            "data_args_path is for all splits, and Megatron would not read per_split_data_args_path: "
            "remove the latter by per_split_data_args_path=null, or the former by data_args_path=null",
        ),
        (
            {"data_path": ["a"], "data_args_path": "x", "test_data_path": ["b"]},
            "data_path and data_args_path are both set: keep one, by data_path=null or data_args_path=null",
        ),
        (
            {"per_split_data_args_path": "x", "train_data_path": ["a"], "valid_data_path": ["b"]},
            "per_split_data_args_path and train_data_path and valid_data_path are both set: remove the latter, e.g. "
            "from SITE_OVERRIDES, or by train_data_path=null valid_data_path=null",
        ),
        ({"data_args_path": "/nowhere"}, "data_args_path=/nowhere cannot be read: No such file"),
        ({"per_split_data_args_path": "/nowhere"}, "per_split_data_args_path=/nowhere cannot be read: No such file"),
        ({"per_split_data_args_path": __file__}, "must be JSON with the keys train, valid, test"),
    ],
)
def test_what_no_blend_is(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        blends(arguments(**settings))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dataloader_fast_cache_load": True}, "dataloader_fast_cache_load reads what .* set data_cache_path to its"),
        (
            {"dataloader_defer_npy_index_mmap": True, "data_cache_path": "c", "mock_data": True},
            "drop it with mock_data",
        ),
        (
            {"dataloader_fast_cache_load": True, "data_cache_path": "c", "data_path": ["a"]},
            "dataloader_fast_cache_load does not divide data_path into splits: set train_data_path and",
        ),
    ],
)
def test_a_prepared_index_has_a_place(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        refuse_missing_files(arguments(**settings))


def test_a_split_without_data(tmp_path: Path) -> None:
    """Megatron counts epochs of nothing until they are enough, for ever."""
    prefix = str(write_tokens(tmp_path / "data", sequences=40))
    refuse_missing_files(arguments(data_path=[prefix], split="50,25,25"))
    refuse_missing_files(arguments(data_path=[prefix], split="90,10,0"))
    for split in (None, "99,1,0"):
        with pytest.raises(UserError, match=r"split=[0-9, ]+ leaves \w+ nothing of 40 sequences: give it more, or 0"):
            refuse_missing_files(arguments(data_path=[prefix], split=split))


@pytest.mark.parametrize("beside", [True, False])
def test_files_that_were_right_are_not_read_again(tmp_path: Path, beside: bool) -> None:
    """Until they change: the index of trillions of tokens has gigabytes."""
    prefix = write_tokens(tmp_path / "data")
    cache = {} if beside else {"data_cache_path": str(tmp_path / "cache")}
    args = arguments(train_data_path=[str(prefix)], padded_vocab_size=300, **cache)
    refuse_damaged_files(args)
    folder = prefix / "cache" / f"{TokenDataset.__name__}_indices" if beside else tmp_path / "cache"
    assert not folder.exists(), "a look leaves nothing"
    refuse_damaged_files(args, remember=True)
    assert len(list(folder.iterdir())) == 1
    file, before = tmp_path / "data.bin", (tmp_path / "data.bin").stat()
    file.write_bytes(b"\xff" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    refuse_damaged_files(args)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(UserError, match="is 65,535, and the model's vocabulary has 300"):
        refuse_damaged_files(args)


def test_how_often_data_are_read(tmp_path: Path) -> None:
    a, b = str(write_tokens(tmp_path / "a")), str(write_tokens(tmp_path / "b", seed=1))
    tokens = {prefix: Path(f"{prefix}.bin").stat().st_size // 2 for prefix in (a, b)}
    iterations = tokens[a] // (4 * 16)
    assert repetition(arguments(train_data_path=[a], train_iters=iterations)) is None
    said = repetition(arguments(train_data_path=[a], train_iters=3 * iterations))
    assert said == f"the run reads {a} {3 * iterations * 64 / tokens[a]:.2f} times over"
    often = repetition(arguments(train_data_path=[a], train_iters=5 * iterations))
    assert (often or "").startswith(f"WARNING: {said.partition(a)[0]}{a} ")
    samples = arguments(train_data_path=["3", a, "1", b], train_samples=8 * iterations)
    assert f"{a} {0.75 * 8 * iterations * 16 / tokens[a]:.2f} times over" in (repetition(samples) or "")
    half = repetition(arguments(data_path=[b], split="50,50,0", train_iters=2 * iterations))
    assert f"{b} {2 * iterations * 64 / tokens[b] / 0.5:.2f} times" in (half or "")
    with pytest.raises(UserError, match=r"without weights has \d+ samples of 16 tokens for training, and the run"):
        repetition(arguments(train_data_path=[a, b], train_iters=3 * iterations))
