import io
import json
from pathlib import Path

import pytest

from megatron_fc.data.job import Job
from megatron_fc.data.status import Progress, Status, Watch, status, words
from megatron_fc.errors import UserError
from support.documents import make, save_tokenizer, texts, write_documents


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A job of two tasks, of which one was lost."""
    for name in "ab":
        write_documents(tmp_path / "in" / f"{name}.jsonl", texts(20, seed=ord(name)))
    make([tmp_path / "in"], tmp_path / "out", save_tokenizer(tmp_path / "small"))
    (tmp_path / "out" / "tasks" / "00001.json").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    return tmp_path / "out"


def test_what_is_done_runs_and_failed(half: Path) -> None:
    done = json.loads((half / "tasks" / "00000.json").read_text())
    running = half / "unfinished" / "00001.abc"
    running.mkdir(parents=True)
    (running / "progress.json").write_text(json.dumps({"size": 70, "documents": 3, "tokens": 50, "bad": 2}))
    (half / "failed").mkdir()
    (half / "failed" / "00001").write_text("b.jsonl is broken")

    seen = Watch(Job.read(half)).look()

    source, made = done["sources"][0], done["splits"]["train"]
    size = sum(path.stat().st_size for path in (half.parent / "in").iterdir())
    failures = {1: "b.jsonl is broken"}
    assert seen == Status(2, 1, 1, failures, size, source["size"] + 70, 20 + 3, made["tokens"] + 50, 2)
    assert "task 1 failed: b.jsonl is broken" in status(half, seconds=0)


def test_speed_and_time_left() -> None:
    before = Status(4, 1, 1, {}, 1000, 200, 10, 5000, 0)
    now = Status(4, 1, 2, {}, 1000, 400, 20, 9000, 1)
    said = words(now, before, seconds=2.0)
    assert said == "1 of 4 tasks  20 documents  9,000 tokens  1 bad lines  2,000 tokens/s  0:06 left"


def test_a_job_that_nobody_runs_says_how_to_go_on(half: Path) -> None:
    assert status(half)[-1].startswith("nothing runs: the same `megatron-fc data tokenize` goes on, unless SLURM")
    with pytest.raises(UserError, match="holds no data of"):
        status(half / "tasks")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_a_pipe_lines(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = Progress(Job.read(half), stream)
        progress.show()
        progress.close()
    assert "1 of 2 tasks" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
    assert "\x1b[" not in pipe.getvalue()
