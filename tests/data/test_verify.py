import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_fc.data.merge import merge
from megatron_fc.data.verify import verify
from megatron_fc.errors import UserError
from support.documents import make, save_tokenizer, texts, write_documents


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for number in range(3):
        write_documents(tmp_path / "in" / f"{number}.jsonl", texts(40, seed=number))
    make([tmp_path / "in"], tmp_path / "out", save_tokenizer(tmp_path / "small"), validation=0.2)
    return tmp_path / "out"


def ignore(line: str) -> None:
    pass


def test_what_was_made_is_right(made: Path) -> None:
    said: list[str] = []
    verify(made, sources=True, report=said.append)
    assert said[0].startswith("train: 3 pairs of files, ")
    assert "first document: '0 " in said[1] or "first document: '1 " in said[1]  # its text, decoded
    assert said[-1] == "3 sources: all right"


def damage_token(folder: Path) -> None:
    ids = np.memmap(folder / "train-00001.bin", np.uint16, "r+")
    ids[7] = 299 if ids[7] != 299 else 298


def foreign_token(folder: Path) -> None:
    np.memmap(folder / "train-00001.bin", np.uint16, "r+")[7] = 300


def cut(folder: Path) -> None:
    data = (folder / "train-00001.bin").read_bytes()
    (folder / "train-00001.bin").write_bytes(data[:-2])


def swap(folder: Path) -> None:
    for kind in ("bin", "idx"):
        (folder / f"train-00001.{kind}").write_bytes((folder / f"train-00002.{kind}").read_bytes())


def forget(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["train"][1]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lose(folder: Path) -> None:
    (folder / "train-00001.idx").unlink()


def change_source(folder: Path) -> None:
    path = folder.parent / "in" / "0.jsonl"
    path.write_bytes(path.read_bytes().replace(b"of", b"or"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage_token, r"train-00001\.bin is not what the manifest says, its SHA-256 differs"),
        (foreign_token, r"train-00001\.bin has the token 300 at 7, and the vocabulary has 300"),
        (cut, r"train-00001\.bin has .* bytes"),
        (swap, r"train-00001\.bin has .* bytes, and .* by manifest\.json beside it"),
        (forget, r"the manifest .*manifest\.json lacks entries: copy it again"),
        (lose, r"train-00001\.idx does not exist, and manifest\.json beside it lists it"),
        (change_source, r"0\.jsonl has changed since it was tokenized"),
    ],
)
def test_what_does_not_fit_is_named(made: Path, harm: Callable[[Path], None], said: str) -> None:
    harm(made)
    with pytest.raises(UserError, match=said):
        verify(made, sources=True, report=ignore)


def test_merged_files_are_those_that_megatron_joins(made: Path, tmp_path: Path) -> None:
    merge(made / "manifest.json", tmp_path / "merged", report=ignore)

    for split in ("train", "valid"):
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
        for task in range(3):
            builder.add_index(str(made / f"{split}-{task:05}"))
        builder.finalize(str(tmp_path / "theirs.idx"))
        for kind in ("bin", "idx"):
            assert (tmp_path / "merged" / f"{split}.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()
    assert len(IndexedDataset(str(tmp_path / "merged" / "train"))) > 60
    verify(tmp_path / "merged", sources=True, report=ignore)
    sizes = [json.loads((folder / "manifest.json").read_text())["tokens"] for folder in (made, tmp_path / "merged")]
    assert sizes[0] == sizes[1]


def test_merging_what_is_damaged_leaves_nothing(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is in use: choose a new folder"):
        merge(made, made, report=ignore)
    damage_token(made)
    with pytest.raises(UserError, match="its SHA-256 differs"):
        merge(made, tmp_path / "merged", report=ignore)
    shutil.rmtree(made / "tokenizer")
    with pytest.raises(UserError, match="tokenizer does not exist: copy it again"):
        merge(made, tmp_path / "merged", report=ignore)
    with pytest.raises(UserError, match="tokenizer cannot be loaded: the folder does not exist"):
        verify(made, sources=False, report=ignore)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
