"""Lists of tasks: their form, the paper's, and that the harness knows what they name."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fc import UserError
from megatron_fc.evaluate.task_list import TaskList, Wanted, average, read_task_list
from megatron_fc.evaluate.tasks import Tasks, fetch

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
LISTS = [str(CONFIGS / name) for name in ("olmoe.yaml", "olmo2.yaml")]


@pytest.mark.parametrize("path", LISTS)
def test_the_paper_s_mean_is_that_of_seven(path: str) -> None:
    wanted = read_task_list([path])
    assert len(wanted.perplexity) == 11
    assert sum(wanted.averages["mmlu_var"].values()) == pytest.approx(1)
    for values in wanted.paper.values():
        assert average(values, wanted.averages["mean_of_seven"]) == pytest.approx(values["mean_of_seven"], abs=7e-4)


@pytest.mark.slow
def test_every_task_of_the_lists_is_known() -> None:
    """An unknown name is refused before any data are looked for, so the only one here is the first that is refused."""
    wanted = read_task_list(LISTS)
    wanted.tasks["hellaswagg"] = Wanted()
    with pytest.raises(UserError, match=r"unknown task 'hellaswagg': did you mean 'hellaswag'\?"):
        Tasks(wanted, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {a: {metrik: acc}}", "unknown key of the task a in .* 'metrik': did you mean 'metric'?"),
        ("tasks: {a: {shots: -1}}", "shots of the task a in .* is -1: give a number, 0 for none"),
        ("task: {a: {}}", "must hold `tasks:`"),
        ("tasks: {a: {}}\naverage: {}", "unknown section in .*: 'average': did you mean 'averages'?"),
        ("tasks: {a: {}}\naverages: {b: {c: 1}}", "averages: b is made of c, which is no task of the list"),
        ("tasks: {a: {}}\nfolder: nowhere", "nowhere is no folder"),
        ("tasks: [", "is not valid YAML"),
    ],
)
def test_refusals(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_task_list([str(path)])


@pytest.mark.parametrize(
    ("tasks", "folders", "said"),
    [
        (["piqa,copa"], [], "unknown task 'piqa,copa': put blanks between tasks, --tasks piqa copa"),
        (
            [LISTS[0], "piqa"],
            [],
            "piqa is given twice, with metric acc_norm and shots 0 and what it says itself",
        ),
        (["piqa", "rate=2"], [], "--tasks rate=2: overrides such as rate=2 stand before --tasks, behind the config"),
        (["piqa"], ["rate=2"], "--include rate=2: overrides such as rate=2 stand before --include, behind the config"),
    ],
)
def test_words_that_are_no_tasks(tasks: list[str], folders: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_task_list(tasks, [Path(folder) for folder in folders])


def test_a_task_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "1 + 1 =", "answer": " 2"}\n')
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
    broken = {"task": "broken", **where, "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({**broken, "doc_to_target": "{{answer}}"}))
    with pytest.raises(UserError, match=r"the harness cannot build the task broken, TemplateSyntaxError: .*: correct"):
        Tasks(read_task_list(["broken"], [tmp_path]), None)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"no data of broken, broken: FileNotFoundError: "):
        fetch(read_task_list(["broken"], [tmp_path]), tmp_path / "data", print)


def test_a_digest_is_of_what_a_task_asks(tmp_path: Path) -> None:
    """Wherever its documents lie: an answer, an example, a setting and code change it, another place does not."""

    def digest(
        folder: str, shots: int = 0, right: str = " 2", example: str = " 3", ask: str = "{}", **more: str
    ) -> str:
        here = tmp_path / folder
        here.mkdir()
        (here / "code.py").write_text(
            f"from functools import partial\n\nASK = {ask!r}\n\ndef _text(doc, end):\n"
            f"    return ASK.format(doc['question']) + end\n\ntext = partial(_text, end='')\n"
        )
        for split, answer in (("test", right), ("train", example)):
            (here / f"{split}.jsonl").write_text(json.dumps({"question": f"{split}: 1 + 1 =", "answer": answer}) + "\n")
        files = {split: str(here / f"{split}.jsonl") for split in ("train", "test")}
        values = {"task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        values |= {"training_split": "train", "fewshot_split": "train", "output_type": "loglikelihood"}
        values |= {"doc_to_text": "CODE", "doc_to_target": "{{answer}}", **more}
        (here / "sums.yaml").write_text(yaml.safe_dump(values).replace("CODE", "!function code.text"))
        return Tasks(TaskList({"sums": Wanted(shots=shots)}, folders=[here]), None).digest("sums")

    first, with_example = digest("first"), digest("with_example", shots=1)
    assert digest("again") == digest("other_example", example=" 2") == first
    assert digest("again_with_example", shots=1) == with_example
    changed = digest("answer", right=" 4"), digest("setting", description="Sums."), digest("other", 1, example=" 2")
    assert len({first, with_example, *changed, digest("code", ask="Question: {}")}) == 6
    with pytest.raises(UserError, match="the task sums is to have 2 shots, and its data have examples for 1: give f"):
        digest("too_many", shots=2)
    # The question may be among the examples.
    with pytest.raises(UserError, match="the task sums is to have 1 shots, and its data have examples for 0: give f"):
        digest("of_questions", shots=1, fewshot_split="test")


def test_a_list_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"cannot read the task list nowhere\.yaml"):
        read_task_list(["nowhere.yaml"])


def test_variants_of_mmlu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(CONFIGS / "tasks")])
    import mmlu_var

    choices = ["one", "two", "three", "four"]
    rows: list[dict[str, Any]] = [{"question": f" Q{n} ", "choices": choices, "answer": n % 4} for n in range(7)]
    found = mmlu_var.variants(rows[5:], rows[:5], "high_school_physics")
    assert len(found) == 2 * 7
    assert found[0]["query"] == "Question: Q5\nAnswer:"
    instruction = "The following are multiple choice questions (with answers) about high school physics:\n\n"
    assert found[1]["query"] == f"{instruction}Question: Q5\nAnswer:"
    assert found[3]["query"] == (
        f"{instruction}Question: Q0\nAnswer: one\n\nQuestion: Q1\nAnswer: two\n\nQuestion: Q5\nAnswer:"
    )
    assert found[6]["query"].count("Answer: ") == 5
    assert [row["answer"] for row in found] == [1] * 7 + [2] * 7
    assert len({name for names in mmlu_var.SUBJECTS.values() for name in names.split()}) == 57


def test_names() -> None:
    assert read_task_list(["piqa"]) == TaskList({"piqa": Wanted()})
