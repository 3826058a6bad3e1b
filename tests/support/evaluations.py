"""Tasks of the lm-evaluation-harness from local files, and evaluations of a tiny trained MoE on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.compress_commands import Done, run

TASKS = ("local_choice", "local_cloze", "local_text", "local_generation")
# Overrides of the config.
CONNECTIONS: dict[str, list[str]] = {
    "dfc_x4": [],
    "residual": ["connection=residual"],
    "dhc_x4": ["connection=dhc"],
    "mhc_x4": ["connection=mhc"],
}
# Answers to these requests are [logprob, is_greedy], to others a text.
_QUESTIONS = [
    {"question": f"def f{n}(x):\n    return", "good": f" x + {n}", "bad": " None" * (n % 3 + 1), "label": n % 2}
    for n in range(5)
]
_TEXTS = [{"text": f"class Parser{n}:\n    def __init__(self):\n        self.n = {n}\n" * (n + 1)} for n in range(3)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks in the harness's YAML format: multiple choice, cloze, perplexity and generation."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def write_tasks(folder: Path) -> Path:
    """Write the tasks and their data to a folder."""
    for name, rows in (("questions", _QUESTIONS), ("texts", _TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shared = {"doc_to_text": "{{question}}", "target_delimiter": "", "doc_to_target": "{{good}}"}
    until = {"until": ["\n"], "max_gen_toks": 6}
    of_task: dict[str, dict[str, Any]] = {
        "local_choice": {
            **shared,
            "output_type": "multiple_choice",
            "doc_to_choice": "{{[good, bad]}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_cloze": {**shared, "output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}]},
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "local_generation": {
            **shared,
            "output_type": "generate_until",
            "generation_kwargs": until,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, values in of_task.items():
        data = folder / ("texts.jsonl" if name == "local_text" else "questions.jsonl")
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data)}}}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **where, "validation_split": "validation", **values})
        )
    return folder


def train(config: Path, name: str, *overrides: str) -> Path:
    """Train for some steps, whose learning rate takes the connections far from where they start; the checkpoints."""
    run_dir = config.parent / name
    options = [f"run_dir={run_dir}", "train_iters=6", "save_interval=3", "lr=0.02", "lr_warmup_iters=0", *overrides]
    done = run(config.parent, "train", config, "eval_interval=1000", *options, "--brief")
    assert done.code == 0, done.printed
    return run_dir / "checkpoints"


def evaluate(config: Path, checkpoints: Path, tasks: Path, out: Path, *words: object, ranks: int = 1) -> Done:
    """Evaluate all tasks, unless the words name others."""
    names = [] if "--tasks" in words else ["--tasks", *TASKS]
    return run(
        out.parent, "evaluate", checkpoints, config, *words, *names, "--include", tasks, "--out", out, ranks=ranks
    )


class Trials:
    """A tiny config, the tasks, and what becomes of each kind of connection, made when it is asked for.

    Attributes:
        config, tasks: their paths.
        checkpoints: of a run, by connection.
        on_one_rank: results of its newest checkpoint, by connection.
    """

    def __init__(self, config: Path, tasks: Path) -> None:
        self.config, self.tasks = config, tasks
        self.checkpoints = _Made(lambda connection: train(config, connection, *CONNECTIONS[connection]))
        self.on_one_rank = _Made(self._evaluated)

    def evaluate(self, connection: str, out: Path, *words: object, ranks: int = 1) -> Done:
        """Evaluate all tasks, unless the words name others."""
        given = [*CONNECTIONS[connection], *words]
        return evaluate(self.config, self.checkpoints[connection], self.tasks, out, *given, ranks=ranks)

    def _evaluated(self, connection: str) -> Path:
        out = self.config.parent / f"{connection}-evaluation"
        done = self.evaluate(connection, out)
        assert done.code == 0, done.printed
        return out


class _Made(dict[str, Path]):
    """Folders by connection."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        self._make = make

    def __missing__(self, connection: str) -> Path:
        self[connection] = self._make(connection)
        return self[connection]


def answers(out: Path) -> dict[str, Any]:
    """Every request's answer, of the newest checkpoint."""
    path = max((out / "answers").glob("*.jsonl"))
    return {line["key"]: line["answer"] for line in map(json.loads, path.read_text().splitlines()[1:])}
