"""Tokenizers by their names on the hub, where it cannot be reached."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_fc.cli.main import main
from megatron_fc.errors import UserError
from megatron_fc.training.hub_tokenizer import load_tokenizer
from support.documents import save_tokenizer
from support.token_files import write_tokens

NAME = "some-owner/some-model"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that refuses connections, and an empty cache of it."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # put back in the end


def test_a_name_out_of_reach_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_tokens(tmp_path / "data")
    words = [f"train_data_path=[{prefix}]", f"valid_data_path=[{prefix}]", f"tokenizer_model={NAME}"]
    words += [f"run_dir={tmp_path / 'run'}"]
    for command in (["train"], ["topology", "--check-files", "--nodes=1", "--gpus-per-node=1"]):
        assert main([command[0], "configs/demo.yaml", *words, *command[1:]]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"megatron-fc: tokenizer_model={NAME}: no folder here, no connection to the hub (")
        assert f"`hf download {NAME} --include '*token*' --local-dir DIR`, then tokenizer_model=DIR\n" in said
        assert said.count("\n") == 1


def test_one_in_the_cache_is_taken_without_asking_for_what_it_lacks(tmp_path: Path) -> None:
    """The client of the hub would look for the other files a tokenizer may have, for half a minute each."""
    stored = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    (stored / "snapshots").mkdir()
    folder = save_tokenizer(stored / "snapshots" / ("0" * 40))
    (folder / "config.json").write_text('{"model_type": "olmo2"}')
    assert len(load_tokenizer(NAME, f"tokenizer_model={NAME}")) == 300
    assert constants.HF_HUB_OFFLINE
    shutil.rmtree(stored)
    with pytest.raises(UserError, match=r"no connection to the hub \(HF_HUB_OFFLINE is set\), and not in its cache"):
        load_tokenizer(NAME, f"tokenizer_model={NAME}")
