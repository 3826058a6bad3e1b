"""An exported model in the harness's own `hf` model: the answers that its checkpoint gives."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import fork_server
from support import training_runs as runs
from support.compress_commands import run
from support.evaluations import TASKS, train

pytestmark = pytest.mark.soak

CLOSE = 1e-4


def responses(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """What a model answered, by task and document, as the harness has logged it."""
    found = {}
    for task in TASKS:
        (path,) = folder.rglob(f"samples_{task}_*.jsonl")
        for line in map(json.loads, path.read_text().splitlines()):
            found[task, line["doc_id"]] = [answer for answers in line["resps"] for answer in answers]
    return found


@pytest.mark.parametrize("connection", ["residual", "dhc"])
def test_every_request_has_the_answer_of_the_export(
    connection: str,
    config: Path,
    tasks: Path,
    tmp_path: Path,
) -> None:
    overrides = [f"connection={connection}", "qk_layernorm_over_heads=true"]
    checkpoints = train(config, f"{connection}_exported", *overrides)
    done = run(tmp_path, "convert", "to-hf", checkpoints, config, *overrides, "--to", tmp_path / "export")
    assert done.code == 0, done.printed
    words = ["--include_path", str(tasks), "--tasks", ",".join(TASKS), "--batch_size", "2", "--log_samples"]
    ours = ["--model", "megatron_fc", "--model_args", f"checkpoint={checkpoints}", f"config={config}", *overrides]
    done = run(tmp_path, "lm-eval", "run", *ours, *words, "--output_path", tmp_path / "ours")
    assert done.code == 0, done.printed
    theirs = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'export'}", "trust_remote_code=True"]
    theirs += ["dtype=float32", "max_length=32", "--device", "cpu", "--output_path", str(tmp_path / "theirs")]
    command = [fork_server.python(), "-m", "lm_eval", "run", *theirs, *words]
    environment = runs.environment() | {"DISABLE_MULTIPROC": "1"}
    harness = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert harness.returncode == 0, harness.stderr[-3000:]
    expected, found = responses(tmp_path / "theirs"), responses(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for (task, document), answers in expected.items():
        for answer, own in zip(answers, found[task, document], strict=True):
            if task == "local_generation":
                assert own == answer
            elif task == "local_text":
                assert float(own) == pytest.approx(float(answer), abs=CLOSE)
            else:
                assert float(own[0]) == pytest.approx(float(answer[0]), abs=CLOSE)
                assert own[1] == answer[1]
