import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_fc.data.executors import LocalExecutor
from megatron_fc.data.filters import Filters
from megatron_fc.data.indexed import token_type
from megatron_fc.data.job import Job
from megatron_fc.data.task import is_validation
from megatron_fc.errors import UserError
from support.documents import contents, load, make, save_tokenizer, texts, write_documents, write_lines, writer
from support.patience import wait_until


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(str(prefix))
    return [ids.tolist() for ids in data[: len(data)]]


@pytest.mark.parametrize(
    "name",
    ["a.parquet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a.jsonl", "a.jsonl.gz", "a.json.zst"))],
)
def test_the_tokens_are_those_of_the_tokenizer_each_document_with_its_end(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    written = texts(10_000 if name == "a.jsonl.gz" else 300)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"id": range(len(written)), "text": written}), tmp_path / name, row_group_size=70)
    else:
        write_documents(tmp_path / name, written)

    make([tmp_path / name], tmp_path / "out", tokenizer)

    direct = load(tokenizer)
    eos = direct.token_to_id("<|endoftext|>")
    ids = [[*direct.encode(text, add_special_tokens=False).ids, eos] for text in written]
    assert documents(tmp_path / "out" / "train-00000") == ids
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["documents"], manifest["tokens"]) == (len(written), sum(map(len, ids)))
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in written)


@pytest.mark.slow
def test_files_are_dealt_out_and_the_result_does_not_depend_on_the_workers(tmp_path: Path, tokenizer: Path) -> None:
    for number in range(5):
        write_documents(tmp_path / "in" / f"{number}.jsonl", texts(20 + number, seed=number))

    make([tmp_path / "in"], tmp_path / "one", tokenizer, tasks=3)
    make([tmp_path / "in"], tmp_path / "two", tokenizer, tasks=3, workers=2)

    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [len(documents(tmp_path / "one" / f"train-{task:05}")) for task in range(3)] == [20 + 23, 21 + 24, 22]
    job = Job.read(tmp_path / "one")
    assert [Path(source.path).name for source in job.shard(1)] == ["1.jsonl", "4.jsonl"]


@pytest.mark.slow
def test_tasks_that_end_together_have_all_ended_well(tmp_path: Path, tokenizer: Path) -> None:
    for number in range(40):  # with a thread per task, by which an end was read twice, one in ten failed
        write_documents(tmp_path / "in" / f"{number:02}.jsonl", texts(2, seed=number))
    make([tmp_path / "in"], tmp_path / "out", tokenizer, workers=8)
    assert sum(len(documents(tmp_path / "out" / f"train-{task:05}")) for task in range(40)) == 80


@pytest.mark.slow
def test_validation_is_chosen_by_the_text(tmp_path: Path, tokenizer: Path) -> None:
    written = texts(400)
    write_documents(tmp_path / "a.jsonl", written)

    make([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, validation=0.25)

    direct = load(tokenizer)
    for split, wanted in (("valid", True), ("train", False)):
        mine = [text for text in written if is_validation(text.encode(), 0.25) == wanted]
        found = [ids[:-1] for ids in documents(tmp_path / "out" / f"{split}-00000")]
        assert found == [direct.encode(text, add_special_tokens=False).ids for text in mine]
    assert 60 < sum(is_validation(text.encode(), 0.25) for text in written) < 140  # 100 are expected, 9 is a deviation


def test_bad_lines_are_counted_by_kind_and_kept(tmp_path: Path, tokenizer: Path) -> None:
    bad = {
        b'{"text": "cut': "json",
        b'["text"]': "json",
        b'{"other": 1}': "field",
        b'{"text": 7}': "type",
        b'{"text": "\xff\xfe"}': "utf8",
        b'{"text": "\\ud800"}': "json",
        b'{"text": " \\n"}': "empty",
        b"": "empty",
        b'{"text": "' + b"x" * 3000 + b'"}': "long",
    }
    good = [json.dumps({"text": text}).encode() for text in texts(30)]
    lines = [*good[:10], *bad, *good[10:]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))

    said = make([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, max_bytes=2000)

    assert len(documents(tmp_path / "out" / "train-00000")) == len(good)
    kept = [json.loads(line) for line in (tmp_path / "out" / "bad" / "00000.jsonl").read_text().splitlines()]
    assert [(line["line"], line["kind"]) for line in kept] == [(11 + at, kind) for at, kind in enumerate(bad.values())]
    for line, whole in zip(kept, bad, strict=True):
        assert whole.startswith(line["content"].rstrip("\n").encode("utf-8", "surrogateescape")[:2000])
    counts = {"empty": 2, "field": 1, "json": 3, "long": 1, "type": 1, "utf8": 1}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bad"] == counts
    assert any(line.startswith("bad lines: 2 empty, 1 no text field, 3 no JSON object") for line in said)


def test_rows_of_parquet_that_are_no_text_are_bad_lines(tmp_path: Path, tokenizer: Path) -> None:
    inner = pa.array([b"good one", None, b"\xff", b" ", b"another"], pa.binary())
    table = pa.table({"doc": pa.StructArray.from_arrays([inner, pa.array(range(5))], ["text", "id"])})
    pq.write_table(table, tmp_path / "a.parquet")

    make([tmp_path / "a.parquet"], tmp_path / "out", tokenizer, text_field="doc.text")

    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bad"] == {"empty": 1, "field": 1, "utf8": 1}
    assert len(documents(tmp_path / "out" / "train-00000")) == 2


@pytest.mark.slow
def test_filters_drop_documents_by_kind(tmp_path: Path, tokenizer: Path) -> None:
    lines = [
        {"text": "one two three four", "max_stars_count": 2},
        {"text": "one two three four", "max_stars_count": 1},
        {"text": "one two three four", "max_stars_count": None},
        {"text": "a a b c d e f", "max_stars_count": 5},  # two of seven
        {"text": "a a b c d e", "max_stars_count": 5},  # two of six are more than 0.3
        {"text": "a a b b c d e", "max_stars_count": 5},  # four of seven are more than 0.5
        {"text": "one two three " + "=" * 800, "max_stars_count": 9},
    ]
    write_lines(tmp_path / "a.jsonl", [json.dumps(line).encode() for line in lines])

    make([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, filters=Filters(True, 2, max_word=0.3, max_two_words=0.5))

    filtered = json.loads((tmp_path / "out" / "manifest.json").read_text())["filtered"]
    assert filtered == {"one_word": 1, "repetition": 1, "stars": 2, "two_words": 1}
    assert len(documents(tmp_path / "out" / "train-00000")) == 2


@pytest.mark.slow
def test_a_broken_archive_fails_its_task_by_name_and_leaves_the_others(tmp_path: Path, tokenizer: Path) -> None:
    for name in "abc":
        write_documents(tmp_path / "in" / f"{name}.jsonl.gz", texts(800, seed=ord(name)))
    whole = (tmp_path / "in" / "b.jsonl.gz").read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 3] ^= 0xFF
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(broken)

    with pytest.raises(UserError, match=r"1 task of 3 failed, task 1: \S+/b\.jsonl\.gz is broken: "):
        make([tmp_path / "in"], tmp_path / "out", tokenizer)
    left = contents(tmp_path / "out")
    assert {"train-00000.bin", "train-00002.bin"} <= set(left)
    assert not {"train-00001.bin", "manifest.json"} & set(left)

    (tmp_path / "in" / "b.jsonl.gz").write_bytes(whole)
    make([tmp_path / "in"], tmp_path / "out", tokenizer)
    make([tmp_path / "in"], tmp_path / "undisturbed", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_cut_archive_is_broken(tmp_path: Path, tokenizer: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl.zst", texts(800))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst is broken: .*Truncated"):
        make([path], tmp_path / "out", tokenizer)


COMMAND = (sys.executable, "-m", "megatron_fc", "data", "tokenize")


def half_written(job: subprocess.Popen[str], out: Path, task: int) -> int:
    """Wait until some of a task's file is written, and return the process that writes it."""
    process = wait_until(lambda: writer(out, task) or job.poll(), "a half-written file")
    assert job.poll() is None
    return process


@pytest.fixture
def half_a_minute_of_text(tmp_path: Path) -> Path:
    """A task that takes some seconds, and two that do not."""
    for name, number in (("a", 6_000), ("b", 300), ("c", 300)):
        write_documents(tmp_path / "in" / f"{name}.jsonl", texts(number, seed=ord(name), longest=200))
    return tmp_path / "in"


def start(inputs: Path, out: Path, tokenizer: Path) -> subprocess.Popen[str]:
    words = [*COMMAND, str(inputs), "--out", str(out), "--tokenizer", str(tokenizer), "--workers", "1"]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(27, marks=pytest.mark.soak)])  # 20 of them of workers
def test_killed_workers_and_jobs_leave_the_same_bytes(
    tmp_path: Path, half_a_minute_of_text: Path, tokenizer: Path, kills: int
) -> None:
    out = tmp_path / "out"
    for number in range(kills):
        job = start(half_a_minute_of_text, out, tokenizer)
        worker = half_written(job, out, task=0)
        if number == 0:
            with pytest.raises(UserError, match="in use by the same command, which still runs"), Job.read(out).held():
                pass
        if number % 4 == 1:  # the job instead, whose worker ends by itself
            job.kill()
            wait_until(lambda: writer(out, task=0) is None, "the end of the worker")
            job.communicate()
        else:
            os.kill(worker, signal.SIGKILL)
            assert "task 0: its process was killed by SIGKILL" in job.communicate()[1]
            assert job.returncode == os.EX_TEMPFAIL
        assert not list(out.glob("train-00000.*"))
    done = (out / "train-00001.bin").stat()

    make([half_a_minute_of_text], out, tokenizer, max_bytes=32 << 20)
    assert (out / "train-00001.bin").stat().st_mtime_ns == done.st_mtime_ns  # not made again
    make([half_a_minute_of_text], tmp_path / "undisturbed", tokenizer, max_bytes=32 << 20)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_named_and_leaves_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    for name, number in (("a", 300), ("b", 6_000)):
        write_documents(tmp_path / "in" / f"{name}.jsonl", texts(number, seed=ord(name), longest=200))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        with pytest.raises(UserError, match=r"1 task of 2 failed, task 1: .*No space left on device"):
            make([tmp_path / "in"], disk / "out", tokenizer)
        assert not list((disk / "out" / "unfinished").iterdir())
        assert (disk / "out" / "train-00000.idx").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        make([tmp_path / "in"], disk / "out", tokenizer)
        make([tmp_path / "in"], tmp_path / "undisturbed", tokenizer)
        assert contents(disk / "out") == contents(tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_file_that_has_gone_is_made_again(tmp_path: Path, tokenizer: Path) -> None:
    for name in "ab":
        write_documents(tmp_path / "in" / f"{name}.jsonl", texts(20, seed=ord(name)))
    make([tmp_path / "in"], tmp_path / "out", tokenizer)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train-00001.bin").unlink()
    make([tmp_path / "in"], tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == before


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, tokenizer: Path) -> None:
    lines = write_documents(tmp_path / "a.jsonl", texts(5))
    rows = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), rows)
    (tmp_path / "a.md").write_text("x")
    packed, array, inside = tmp_path / "packed.jsonl", tmp_path / "array.json", tmp_path / "in"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    array.write_text(json.dumps([{"text": "a"}], indent=1))
    write_documents(inside / "a.jsonl", texts(5))
    stars = {"filters": Filters(min_stars=2)}
    for inputs, said, options in [
        ([packed], r"packed\.jsonl has no document .*not UTF-8\): write it in UTF-8, and let \.gz", {}),
        ([array], r"array\.json has no document .*: write a JSON object per line", {}),
        ([lines], r"over the length limit\): give a larger --max-bytes", {"max_bytes": 9}),
        ([lines], r"a\.jsonl has no field max_stars_count in its first 5 lines: give --stars-field", stars),
        ([rows], r"has no column max_stars_count: leave out the filter", {"text_field": "body", **stars}),
        (["none://there"], r"none://there cannot be read", {}),
        ([lines], r"lines \(no text field\): --text-field is body, and line 1 has: text$", {"text_field": "body"}),
        ([rows], r"has no column text: give --text-field one of body, n", {}),
        ([rows], r"column n is int64 and no text", {"text_field": "n"}),
        ([tmp_path / "none"], r"none does not exist", {}),
        ([tmp_path / "a.md"], r"a\.md holds no file with documents", {}),
        ([lines, lines], r"a\.jsonl is named twice", {}),
        ([lines], r"--tasks=2: give 1 to 1", {"tasks": 2}),
        ([lines], r"--validation=1: give a share", {"validation": 1.0}),
        ([lines], r"'<end>' is no token of the tokenizer", {"eos": "<end>"}),
    ]:
        with pytest.raises(UserError, match=said):
            make(inputs, tmp_path / "out", tokenizer, **options)
    for name, said in [(inside, "the folder has no tokenizer.json"), (tokenizer / "tokenizer.json", "it is a file")]:
        with pytest.raises(UserError, match=rf"--tokenizer=.* cannot be loaded: {said}"):
            make([lines], tmp_path / "out", name)
    with pytest.raises(UserError, match=r"--out=\S+/in/out lies in \S+/in, all of which is read"):
        make([inside], inside / "out", tokenizer)
    with pytest.raises(UserError, match=r"in/a\.jsonl lies in --out=\S+/in, where this command writes"):
        make([inside / "a.jsonl"], inside, tokenizer)
    assert not (tmp_path / "out").exists()
    assert list(inside.iterdir()) == [inside / "a.jsonl"]


def test_a_folder_in_use_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl", texts(5))
    make([path], tmp_path / "out", tokenizer)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"with other options \(append_eos True there, False here\): choose"):
        make([path], tmp_path / "out", tokenizer, append_eos=False)
    write_documents(path, texts(6))
    with pytest.raises(
        UserError, match=r"other sources \(\S+/a\.jsonl [\d,]+ bytes there, [\d,]+ bytes here\): choose"
    ):
        make([path], tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UserError, match="in use by something else"):
        make([path], tmp_path / "mine", tokenizer)


def test_a_source_that_changes_in_between_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    paths = [write_documents(tmp_path / "in" / f"{name}.jsonl.gz", texts(30, seed=ord(name))) for name in "ab"]
    whole = paths[1].read_bytes()
    make(paths, tmp_path / "out", tokenizer)
    (tmp_path / "out" / "tasks" / "00001.json").unlink()
    job = Job.read(tmp_path / "out")
    job.forget_lost()
    paths[1].write_bytes(whole + gzip.compress(b'{"text": "more"}\n'))
    failures = LocalExecutor(job, 1).run(lambda: None)
    assert list(failures) == [1]
    assert "when this job began" in failures[1]


def test_types_of_tokens_are_those_of_megatron() -> None:
    for vocabulary in (300, 65_499, 65_500, 65_536, 100_000):
        assert token_type(vocabulary) == np.dtype(DType.optimal_dtype(vocabulary))
