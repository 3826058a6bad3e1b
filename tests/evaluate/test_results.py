"""Files of results and answers: whose they are, what is not overwritten, and what is refused by name."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fc import UserError
from megatron_fc.cli.evaluate import out_of
from megatron_fc.evaluate.answers import Answers
from megatron_fc.evaluate.report import read_runs
from megatron_fc.evaluate.results import add_results, lacking, read_results

FACTS = {"checkpoint": "run/iter_0000001", "connection": "dfc_x4", "iteration": 1, "tokens": 10}
MODEL = {"checkpoint": "/run/iter_0000001", "precision": "torch.float32"}


def test_a_result_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "iter_0000001.json"
    results = add_results(path, FACTS, "tasks", {"piqa": {"value": 0.5, "limit": None}})
    assert lacking(results, "tasks", {"piqa": {"limit": None}, "copa": {"limit": None}}) == ["copa"]
    assert lacking(read_results(tmp_path / "iter_0000002.json"), "tasks", {"piqa": {"limit": 1}}) == ["piqa"]
    with pytest.raises(UserError, match="piqa of run/iter_0000001 has a result already, with limit=None, and not 1"):
        lacking(results, "tasks", {"piqa": {"limit": 1}})
    results = add_results(path, FACTS, "perplexity", {"c4": {"value": 3.0, "digest": "a"}})
    assert lacking(results, "perplexity", {"c4": {"digest": "a"}}) == []
    with pytest.raises(UserError, match="the content of c4 has changed since the result of run/iter_0000001"):
        lacking(results, "perplexity", {"c4": {"digest": "b"}})


def test_the_results_of_a_release_are_found(tmp_path: Path) -> None:
    add_results(tmp_path / "release.json", FACTS, "tasks", {})
    assert [run.label for run in read_runs([tmp_path])] == ["dfc_x4"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is damaged"), ("[]", "is no file of results"), ("{}", "has schema None"), (b"\xff", "is damaged")],
)
def test_damaged_results(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "iter_0000001.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        read_results(path)


def make_file(path: Path) -> None:
    path.parent.parent.mkdir()
    path.parent.write_text("")


def make_nuls(path: Path) -> None:
    ask(path, MODEL)
    with path.open("ab") as stream:
        stream.write(bytes(100) + b"\n")


def make_other(path: Path) -> None:
    ask(path, {**MODEL, "precision": "torch.bfloat16"})


def ask(path: Path, model: dict[str, Any]) -> list[int]:
    """Ask one request; the requests that were run."""
    ran: list[int] = []

    def run(numbers: list[int]) -> Iterator[list[tuple[int, Any]]]:
        ran.extend(numbers)
        yield [(0, [-1.0, True])]

    answers = Answers(path, model)
    assert answers.ask(["key"], run, lambda *_: None) == [[-1.0, True]]
    answers.close()
    return ran


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_file, "cannot be written, "),
        (make_nuls, "is damaged, .*: delete it"),
        (make_other, "is of another model, precision: torch.bfloat16 there, torch.float32 here: give another --out"),
    ],
)
def test_answers_that_are_refused(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers" / "iter_0000001.jsonl"
    make(path)
    with pytest.raises(UserError, match=said):
        Answers(path, MODEL)


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "iter_0000001.jsonl"
    assert ask(path, MODEL) == [0]
    assert ask(path, MODEL) == []
    path.write_bytes(path.read_bytes()[:-3])
    assert ask(path, MODEL) == [0]
    assert ask(path, MODEL) == []


@pytest.mark.parametrize("source", ["moe7b/checkpoints", "moe7b/checkpoints/iter_0000006", "moe7b/release", "moe7b"])
def test_the_default_folder_is_of_the_run(source: str, tmp_path: Path) -> None:
    given = Namespace(source=tmp_path / source, overrides=[], out=None)
    assert out_of(given) == Path("runs/moe7b-evaluation")
    given.overrides = ["run_dir=there"]
    assert out_of(given) == Path("there")
