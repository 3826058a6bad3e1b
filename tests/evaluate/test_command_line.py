"""The harness's own command line: our model by name, what of it is refused at once, and its own models."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fc import UserError
from megatron_fc.evaluate.command_line import open_model
from support import training_runs as runs


@pytest.mark.parametrize(
    ("words", "batch_size", "said"),
    [
        ({"config": "a.yaml"}, None, "--model_args lacks checkpoint=...: give checkpoint=FOLDER config=FILE"),
        ({"checkpoint": "a"}, None, "--model_args lacks config=..."),
        *(
            ({"checkpoint": "a", "config": "a.yaml"}, size, f"--batch_size {size}: give a number from 1 on, or auto")
            for size in (0, "0", -1, 1.5, "auto:4")
        ),
    ],
)
def test_words_are_refused(words: dict[str, Any], batch_size: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_model(words, {"batch_size": batch_size})


@pytest.mark.soak
def test_the_harness_s_models_run_as_they_do_without_us(config: Path, tasks: Path, tmp_path: Path) -> None:
    """In a Python of its own: on the CPU lane, which our model needs, theirs do not load."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(yaml.safe_load(config.read_text())["data"]["tokenizer_model"])
    tokenizer.save_pretrained(tmp_path / "hf")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "hf")
    words = ["run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'hf'}", "--include_path", str(tasks)]
    command = [sys.executable, "-m", "megatron_fc", "lm-eval", *words, "--tasks", "local_choice", "--limit", "1"]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|local_choice|" in done.stdout.replace(" ", "")
