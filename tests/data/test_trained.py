"""What was tokenized and blended, in a run of two ranks: the documents that it sees are those that were written."""

import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer

from megatron_fc.data.blend import blend
from megatron_fc.runs.summary import read_summary
from megatron_fc.training.data_files import OF_A_PREPARED_INDEX, blends
from megatron_fc.training.indexed_files import IndexedFiles
from megatron_fc.training.token_data import TokenDataConfig, TokenDataset
from support.documents import load, make, save_tokenizer, texts, write_documents
from support.training_runs import command, environment
from support.training_runs import config as config

LENGTH, STEPS, BATCH = 32, 5, 4


def samples_of(listed: Path, cache: Path, tokenizer: Path) -> list[np.ndarray]:
    """The samples of training, [LENGTH] each, by the order in the cache."""
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")
    args = Namespace(**dict.fromkeys(names), per_split_data_args_path=str(listed))
    train = next(blend for blend in blends(args) if blend.setting == "train_data_path")
    settings = TokenDataConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        blend_per_split=[(list(train.prefixes), list(train.weights or ())), None, None],
        path_to_cache=str(cache),
        tokenizer=MegatronTokenizer.from_pretrained(
            str(tokenizer),
            metadata_path={"library": "huggingface"},
            # As Megatron's arguments say them; they are part of the cache's key.
            **dict.fromkeys(("chat_template", "vocab_file", "merges_file")),
            additional_special_tokens=[],
            use_fast=True,
            trust_remote_code=False,
            include_special_tokens=True,
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        vocabulary=300,
        versions={prefix: IndexedFiles.read(prefix, "data").version for prefix in train.prefixes},
    )
    data = BlendedMegatronDatasetBuilder(TokenDataset, [STEPS * BATCH, 0, 0], lambda: True, settings).build()[0]
    return [data[i]["tokens"].numpy() for i in range(STEPS * BATCH)]


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_ranks_read_a_blend(config: Path, tmp_path: Path, prepared: bool) -> None:
    written = {name: texts(600, seed=seed, longest=4) for name, seed in (("a", 1), ("b", 2))}
    small = save_tokenizer(tmp_path / "small")
    for name, documents in written.items():
        for half in range(2):
            write_documents(tmp_path / f"in_{name}" / f"{half}.jsonl", documents[half::2])
        make([tmp_path / f"in_{name}"], tmp_path / name, small, validation=0.2)
    listed, cache = tmp_path / "blend.json", tmp_path / "cache"
    settings = {"weights": [0.75, 0.25], "mix": None, "tokens": None, "max_epochs": 4.0, "report": lambda line: None}
    blend([str(tmp_path / name) for name in written], listed, **settings)

    words = [f"per_split_data_args_path={listed}", "train_data_path=null", "valid_data_path=null", "save_interval=null"]
    words += [f"tokenizer_model={tmp_path / 'a' / 'tokenizer'}", f"data_cache_path={cache}", f"train_iters={STEPS}"]
    if prepared:
        make_index = command(config, *words)
        make_index[3:4] = ["data", "index"]
        subprocess.run(make_index, env=environment(), check=True)
        words += [f"{name}=true" for name in OF_A_PREPARED_INDEX]
    line = command(config, f"run_dir={tmp_path / 'run'}", *words)
    line[2:2] = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert (summary["world_size"], summary["tokens"]) == (2, STEPS * BATCH * LENGTH)

    # The run's order lies in its cache: what is built again from there adds no file to it.
    cached = set(cache.iterdir())
    samples = samples_of(listed, cache, tmp_path / "a" / "tokenizer")
    assert set(cache.iterdir()) == cached
    direct = load(small)
    known = {name: [tuple(direct.encode(text).ids) for text in documents] for name, documents in written.items()}
    seen: set[tuple[int, ...]] = set()
    for sample in samples:
        whole = np.split(sample, np.flatnonzero(sample == direct.token_to_id("<|endoftext|>")))[1:-1]
        seen |= {tuple(piece[1:].tolist()) for piece in whole}
    assert len(seen) > STEPS
    assert seen <= {ids for documents in known.values() for ids in documents}
