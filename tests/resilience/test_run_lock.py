"""The lock of a run, with processes that hold it, die, stop and race."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_fc.errors import UserError
from megatron_fc.resilience.run_lock import LOCK, run_lock

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
HOLD = """
import sys
from pathlib import Path
from megatron_fc.resilience import run_lock
run_lock._SIGN_SECONDS = 0.05
with run_lock.run_lock(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def holder(run_dir: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    with process:
        yield process
        process.kill()


def left_behind(run_dir: Path, **facts: Any) -> Path:
    """The lock of a start that has ended without a word, on another machine unless `facts` say otherwise."""
    with run_lock(run_dir):
        held = json.loads((run_dir / LOCK).read_text())
    (run_dir / LOCK).write_text(json.dumps(held | {"host": "n7", "boot": "another", "token": "its own"} | facts))
    return run_dir / LOCK


def is_taken(run_dir: Path) -> bool:
    before = (run_dir / LOCK).read_text()
    try:
        with run_lock(run_dir):
            assert (run_dir / LOCK).read_text() != before
    except UserError:
        assert (run_dir / LOCK).read_text() == before
        return True
    assert not list(run_dir.glob(f"{LOCK}*"))
    return False


def test_a_second_training_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        sentence = (
            rf"^run_dir={tmp_path} belongs to process {first.pid} on .*, which has trained since .* and gave a sig"
        )
        with pytest.raises(UserError, match=sentence) as refused, run_lock(tmp_path):
            pass
        assert str(refused.value).endswith(f"if it is gone, delete {tmp_path / LOCK}")
        assert first.communicate()[0] == "released\n"
    assert not list(tmp_path.iterdir())


def test_a_killed_one_leaves_a_lock_that_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / LOCK).exists()
        assert not is_taken(tmp_path)


def test_a_stopped_one_still_holds_it_and_ends_where_it_has_lost_it(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        assert is_taken(tmp_path)
        os.utime(tmp_path / LOCK, (time.time() - 700,) * 2)
        with run_lock(tmp_path):
            first.send_signal(signal.SIGCONT)
            assert first.wait() == 2
            assert first.stderr is not None
            assert f"{tmp_path / LOCK} is now that of process {os.getpid()} on" in first.stderr.read()


@pytest.mark.parametrize(
    ("facts", "is_living"),
    [
        ({}, True),
        ({"job": "17"}, True),  # no SLURM here says whether it runs
        ({"job": "18", "restart": 1}, False),  # SLURM has requeued it since, perhaps on another node
        ({"job": "18", "restart": 2}, True),  # this very start, by another step
        ({"host": os.uname().nodename}, False),  # booted since
        ({"host": "a container's", "boot": BOOT, "processes": "pid:[1]"}, True),  # which numbers its own
        ({"boot": BOOT, "process": 2**22 + 1}, False),  # gone, on a machine that was renamed
    ],
)
def test_who_is_known_to_be_dead(
    tmp_path: Path, facts: dict[str, Any], is_living: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lock = left_behind(tmp_path, **facts)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert is_taken(tmp_path) == is_living
    if is_living:
        os.utime(lock, (time.time() - 590,) * 2)
        assert is_taken(tmp_path)
        os.utime(lock, (time.time() - 610,) * 2)
        assert not is_taken(tmp_path)


@pytest.mark.parametrize(
    ("squeue", "is_living"),
    [
        ("echo 17", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_slurm_says_whether_another_job_runs(
    tmp_path: Path, squeue: str, is_living: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As squeue of SLURM 22.05 answers."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    left_behind(tmp_path / "run", job="17")
    assert is_taken(tmp_path / "run") == is_living


def test_the_launch_scripts_give_a_run_to_the_next_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a chain's, in a container without squeue."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    (tmp_path / "job").write_text("17\n")
    left_behind(tmp_path, job="17")
    assert is_taken(tmp_path)
    (tmp_path / "job").write_text("18\n")
    assert not is_taken(tmp_path)


def test_one_of_many_takes_a_dead_ones_lock(tmp_path: Path) -> None:
    left_behind(tmp_path, host=os.uname().nodename)
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    racing = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [process.stdout.readline() for process in racing if process.stdout]
    assert sorted(said) == [""] * 5 + ["holds\n"]
    for process in racing:
        process.communicate()
    assert not list(tmp_path.iterdir())


def test_ranks_of_one_start_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("MASTER_PORT", "20001")
    monkeypatch.setattr("megatron_fc.resilience.run_lock._JOIN_SECONDS", 0.1)
    with run_lock(tmp_path):
        before = (tmp_path / LOCK).read_text()
        monkeypatch.setenv("RANK", "3")
        with run_lock(tmp_path):
            pass
        assert (tmp_path / LOCK).read_text() == before
        monkeypatch.setenv("MASTER_PORT", "20002")
        with pytest.raises(UserError, match="belongs to process"), run_lock(tmp_path):
            pass


def test_other_ranks_wait_for_the_first_one_to_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which runs where the last start was killed, and so knows that it was."""
    lock, waiting = left_behind(tmp_path), []
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("RANK", "3")

    def first_rank(_: float) -> None:
        waiting.append(lock.read_text())
        lock.write_text(json.dumps(json.loads(waiting[-1]) | {"launch": "n0:None"}))

    monkeypatch.setattr("megatron_fc.resilience.run_lock.time.sleep", first_rank)
    with run_lock(tmp_path):
        assert len(waiting) == 1


def test_a_torn_lock_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fc.resilience.run_lock._WRITE_SECONDS", 0.0)
    (tmp_path / LOCK).write_text('{"host": "n')
    with (
        pytest.raises(UserError, match=f"^{tmp_path / LOCK} is damaged: delete it if nothing trains"),
        run_lock(tmp_path),
    ):
        pass


def test_a_run_dir_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(UserError, match=r"lock cannot be written, File exists: repair that"),
        run_lock(tmp_path / "run"),
    ):
        pass
