import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from megatron_fc.data import DemoData, build_demo_data
from megatron_fc.data.corpus import Root, collect, is_validation
from megatron_fc.data.demo import VALIDATION_FRACTION
from megatron_fc.errors import UserError

Build = Callable[..., DemoData]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(150):
        line = f"def f{number}(x):\n    return x * {number}  # caf\u00e9 \u6f22 <|endoftext|>\n"
        (folder / f"module_{number}.py").write_text(line * 10, encoding="utf-8")
    return Root("lib", folder, "1.0")


@pytest.fixture
def build(root: Root) -> Build:
    def run(out: Path, *, vocab_size: int = 300, root: Root = root) -> DemoData:
        return build_demo_data(out, vocab_size=vocab_size, report=lambda _: None, roots=[root])

    return run


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _only_entry(folder: Path, *, but: str = "sources") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != but)


def test_megatron_reads_back_exactly_the_documents_of_each_split(build: Build, root: Root, tmp_path: Path) -> None:
    data = build(tmp_path / "demo")

    tokenizer = Tokenizer.from_file(str(data.tokenizer / "tokenizer.json"))
    eod = tokenizer.get_vocab()["<|endoftext|>"]
    documents = collect([root])
    for prefix, tokens, valid in (
        (data.train_prefix, data.train_tokens, False),
        (data.valid_prefix, data.valid_tokens, True),
    ):
        dataset = IndexedDataset(str(prefix))
        texts = []
        for ids in dataset[: len(dataset)]:
            assert ids[-1] == eod
            assert eod not in ids[:-1]
            texts.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
        assert texts == [d.text for d in documents if is_validation(d, VALIDATION_FRACTION) == valid]
        assert list(dataset.document_indices) == list(range(len(texts) + 1))
        assert tokens == dataset.sequence_lengths.sum()
    assert data.documents == len(documents) == 150
    assert data.text_bytes == sum(len(document.text.encode()) for document in documents)


def test_two_builds_are_identical_wherever_the_sources_lie(build: Build, root: Root, tmp_path: Path) -> None:
    moved = Root(root.name, Path(shutil.copytree(root.folder, tmp_path / "b" / "moved")), root.version)

    first, second = build(tmp_path / "first"), build(tmp_path / "second", root=moved)

    assert _contents(first.root) == _contents(second.root)


def test_the_manifest_tells_settings_counts_and_checksums(build: Build, tmp_path: Path) -> None:
    data = build(tmp_path / "demo")

    manifest = json.loads((data.root / "manifest.json").read_text())

    assert manifest["settings"]["vocab_size"] == 300
    assert manifest["settings"]["sources"] == {"lib": "1.0"}
    assert manifest["splits"]["train"]["tokens"] == data.train_tokens
    assert manifest["splits"]["valid"]["tokens"] == data.valid_tokens
    assert manifest["sha256"].keys() == _contents(data.root).keys() - {"manifest.json"}


def test_a_finished_build_is_reused_untouched(build: Build, tmp_path: Path) -> None:
    first = build(tmp_path / "demo")
    times = {path: path.stat().st_mtime_ns for path in first.root.rglob("*")}

    second = build(tmp_path / "demo")

    assert (first.reused, second.reused) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*")} == times
    assert second.train_tokens == first.train_tokens


def test_other_settings_rebuild_and_drop_the_cache_of_the_old_data(build: Build, root: Root, tmp_path: Path) -> None:
    old = build(tmp_path / "demo")
    cache = old.train_prefix / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)

    assert build(tmp_path / "demo").reused
    assert cache.exists()
    assert not build(tmp_path / "demo", vocab_size=301).reused
    assert not cache.exists()
    assert not build(tmp_path / "demo", vocab_size=301, root=Root(root.name, root.folder, "1.1")).reused
    assert _only_entry(tmp_path) == ["demo"]


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_build_is_rebuilt(build: Build, tmp_path: Path, damage: str) -> None:
    data = build(tmp_path / "demo")
    before = _contents(data.root)
    if damage == "truncate":
        (data.root / "train.bin").write_bytes(before["train.bin"][:-2])
    else:
        (data.root / "tokenizer" / "tokenizer.json").unlink()

    assert not build(tmp_path / "demo").reused
    assert _contents(data.root) == before


def test_an_interrupted_build_leaves_nothing_and_an_interrupted_rebuild_the_old_data(
    build: Build, root: Root, tmp_path: Path
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("wrote train"):
            raise KeyboardInterrupt

    def interrupted(vocab_size: int) -> None:
        build_demo_data(tmp_path / "demo", vocab_size=vocab_size, report=interrupt, roots=[root])

    with pytest.raises(KeyboardInterrupt):
        interrupted(300)
    assert _only_entry(tmp_path) == []

    old = _contents(build(tmp_path / "demo").root)
    with pytest.raises(KeyboardInterrupt):
        interrupted(301)
    assert _only_entry(tmp_path) == ["demo"]
    assert _contents(tmp_path / "demo") == old


def test_a_build_that_another_process_finished_first_is_taken(build: Build, root: Root, tmp_path: Path) -> None:
    def overtake(line: str) -> None:
        if line.startswith("wrote valid"):
            build(tmp_path / "demo")

    data = build_demo_data(tmp_path / "demo", vocab_size=300, report=overtake, roots=[root])

    assert data.reused
    assert _only_entry(tmp_path) == ["demo"]


def test_an_existing_empty_folder_is_used(build: Build, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()

    assert not build(tmp_path / "demo").reused


def test_a_linked_folder_stays_a_link(build: Build, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "demo").symlink_to(tmp_path / "disk")

    data = build(tmp_path / "demo")

    assert (tmp_path / "demo").is_symlink()
    assert data.root == tmp_path / "disk"


@pytest.mark.parametrize("before", ["foreign folder", "foreign file in a finished build"])
def test_files_of_others_are_never_removed(build: Build, tmp_path: Path, before: str) -> None:
    out = tmp_path / "demo"
    if before == "foreign folder":
        (out / "train").mkdir(parents=True)
        expected = "train"
    else:
        build(out)
        (out / "notes.txt").write_text("mine")
        expected = "notes.txt"

    with pytest.raises(UserError, match=rf"holds other files \({expected}\)"):
        build(out, vocab_size=301)
    assert (out / expected).exists()
    assert _only_entry(tmp_path) == ["demo"]


def test_a_file_in_place_of_the_folder_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine")

    with pytest.raises(UserError, match="is a file, not a folder"):
        build(tmp_path / "demo")
    with pytest.raises(UserError, match=r"cannot write the demo data to .*demo/sub: Not a directory"):
        build(tmp_path / "demo" / "sub")


def test_a_read_only_place_is_one_clear_error(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: root may write there all the same.
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot write the demo data to .*demo: Read-only file system$"):
        build(tmp_path / "demo")


def test_a_vocabulary_that_is_too_small_is_refused_before_anything_is_written(build: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 258"):
        build(tmp_path / "new" / "demo", vocab_size=257)
    assert not (tmp_path / "new").exists()


def test_too_little_text_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()

    with pytest.raises(UserError, match=r"found 0 documents .*/bare: both splits"):
        build(tmp_path / "demo", root=Root("lib", tmp_path / "bare"))
    assert _only_entry(tmp_path) == ["bare"]
