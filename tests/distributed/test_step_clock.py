"""Ranks that hang: all others end and say which one it was."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_fc.resilience.hang import SILENT, StepClock, describe
from support import harness

NAME = r"rank {} \(process \d+ on \S+\)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        pytest.param("sleep", 2, f"{NAME.format(2)} in hang .ranks.py:\\d+.; .* in barrier ", marks=pytest.mark.slow),
        ("sleep", 0, f"{NAME.format(0)} in hang .ranks.py:\\d+.; .* in barrier "),
        pytest.param("stop", 2, f"{NAME.format(2)} {SILENT}; .* in barrier ", marks=pytest.mark.slow),
        pytest.param("stop", 0, f"{NAME.format(0)} {SILENT}, ", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_others_end(how: str, rank: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        harness.run("hang", 3, tmp_path, how, rank)
    for other in {0, 1, 2} - {rank}:
        assert f"rank {other}, exit code 75" in str(failure.value)
        log = (tmp_path / f"rank{other}.log").read_text()
        assert re.search(f"^megatron-fc: no step for \\d+ s: {said}.*so this rank ends: do so$", log, re.MULTILINE), log
        assert "Current thread" in log, "the stacks of all threads are there"
    notes = {0, 1, 2} - ({rank} if how == "stop" else set())
    noted = 0 if 0 in notes else 2
    assert [path.name for path in sorted(tmp_path.glob("noted*"))] == [f"noted{noted}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "advice"),
    [
        pytest.param("fail", "the tracker is torn", marks=pytest.mark.slow),
        ("block", "its files do not answer within 1 s, repair that, start the same command again"),
        pytest.param("block the log", "do so", marks=pytest.mark.slow),
    ],
)
def test_files_that_fail_or_never_answer_keep_no_rank(files: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        harness.run("hang", 2, tmp_path, "sleep", 1, files)
    for rank in (0, 1):
        assert f"rank {rank}, exit code 75" in str(failure.value)
        log = (tmp_path / f"rank{rank}.log").read_text()
        assert re.search(f"^megatron-fc: no step for .*, so this rank ends: {advice}$", log, re.MULTILINE), log


def test_steps_are_no_hang(tmp_path: Path) -> None:
    assert harness.run("step_slowly", 2, tmp_path) == [None, None]


def test_the_first_step_may_take_longer() -> None:
    args = Namespace(distributed_timeout_minutes=60, distributed_timeout_seconds_after_init=600, curr_iteration=100)
    clock = StepClock(args)
    step = clock.count(lambda: None)
    for skipped in (100, 101):
        args.curr_iteration = skipped
        assert clock.limit == 0.8 * 3600
    args.curr_iteration = 102
    for _ in range(8):
        step()
        assert clock.limit == 0.8 * 3600
    args.curr_iteration = 103
    assert clock.limit == 0.8 * 600


def test_the_odd_ones_are_named_first() -> None:
    places = {f"rank {rank}": "in wait (c10d.py:1)" for rank in range(512)}
    assert describe(places | {"rank 7": "in read (disk.py:2)"}) == (
        "rank 7 in read (disk.py:2); rank 0, rank 1, rank 2 and 508 more in wait (c10d.py:1)"
    )
    assert describe(places | {"rank 7": SILENT, "rank 8": SILENT}).startswith(f"rank 7, rank 8 {SILENT}; rank 0, ")
