"""`megatron-fc train` as a user runs it: in a process of its own, on real text."""

import argparse
import inspect
import os
import subprocess
import typing
from pathlib import Path

import pytest
import yaml

from megatron_fc.data import build_demo_data
from megatron_fc.data.corpus import Root
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.runs.summary import read_summary
from support import fork_server

ITERATIONS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE-like model on a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "text").mkdir()
    lines = [line for module in (argparse, inspect, typing) for line in inspect.getsource(module).splitlines()]
    for start in range(0, len(lines), 50):
        (folder / "text" / f"{start}.py").write_text("\n".join(lines[start : start + 50]))
    sources = Root("text", folder / "text")
    data = build_demo_data(folder / "data", vocab_size=300, report=lambda _: None, roots=[sources])
    demo = yaml.safe_load((Path(__file__).parents[2] / "configs" / "demo.yaml").read_text())
    demo["model"] |= {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32}
    demo["model"] |= {"max_position_embeddings": 32, "num_experts": 4, "moe_ffn_hidden_size": 32}
    demo["data"] |= {"train_data_path": [str(data.train_prefix)], "valid_data_path": [str(data.valid_prefix)]}
    demo["data"]["tokenizer_model"] = str(data.tokenizer)
    demo["optimizer"] |= {"train_iters": ITERATIONS, "lr_decay_iters": ITERATIONS, "lr_warmup_iters": 4}
    demo["optimizer"] |= {"eval_iters": 2, "micro_batch_size": 2, "global_batch_size": 4}
    demo["checkpoint"]["save_interval"] = 10
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(demo))
    return path


def command(config: Path, *overrides: str) -> list[str]:
    """The words of a training; `fork_server` says what they begin with."""
    return [fork_server.python(), "-m", "megatron_fc", "train", str(config), *overrides]


def environment() -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launcher}


def train(config: Path, run_dir: Path, *overrides: str) -> dict:
    done = subprocess.run(
        command(config, f"run_dir={run_dir}", *overrides),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_summary(run_dir)
    assert summary is not None
    return {**summary, "printed": done.stdout}


def figures(run_dir: Path) -> dict:
    """Everything that was logged but the time it took."""
    scalars = read_metrics(run_dir).scalars
    return {tag: series for tag, series in scalars.items() if "time" not in tag and "vs samples" not in tag}


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """An undisturbed DFCx4 run."""
    run_dir = config.parent / "dfc_x4"
    train(config, run_dir)
    return run_dir
