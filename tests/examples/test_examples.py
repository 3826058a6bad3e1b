"""Every file of examples/, run as its first lines say, prints what they say that one should see."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megatron
from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.checkpoints.stored_tensors import StoredTensors
from megatron_fc.runs.metrics import read_metrics
from support import evaluations, fork_server, olmo, training_runs
from support.documented import ROOT, first_missing

EXAMPLES = ROOT / "examples"
SHARED = {"one_process.py", "on_cpu.py"}  # parts of others
PROGRAMS = {"python": "", "megatron-fc": "-m megatron_fc"}
# Of one process, without torchrun's own.
TORCHRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0
exec {python} "$@"
"""
# Without these packages' lists of all that they have, which need Transformer Engine.
BRIDGE = """
import runpy, sys, types
import megatron
for name in ("bridge", "bridge.models", "bridge.models.olmoe", "bridge.utils", "bridge.training"):
    package = types.ModuleType(f"megatron.{name}")
    package.__path__ = [f"{place}/{name.replace('.', '/')}" for place in megatron.__path__]
    sys.modules[package.__name__] = package
sys.path.insert(0, "examples")
runpy.run_path("examples/megatron_bridge.py", run_name="__main__")
"""

config = training_runs.config


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs a command in the repository's folder with the programs of an installation; returns what it prints."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, words in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/bash\nexec {fork_server.python()} {words} "$@"\n')
    (programs / "torchrun").write_text(TORCHRUN.format(python=fork_server.python()))
    for program in programs.iterdir():
        program.chmod(0o755)

    def run(*words: object, code: int = 0, **variables: object) -> str:
        environ = training_runs.environment() | {name: str(value) for name, value in variables.items()}
        environ["PATH"] = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """Checkpoints of a few steps, whose learning rate takes the connections away from their start."""
    return evaluations.train(config, "examples")


def promised(example: str) -> list[str]:
    """The lines that its first lines say one should see."""
    text = (EXAMPLES / example).read_text()
    if example.endswith(".py"):
        first = ast.get_docstring(ast.parse(text)) or ""
    else:
        first = re.sub("^# ?", "", text.partition("\nset ")[0], flags=re.MULTILINE)
    return re.findall("^(?:    |  )(.*)", re.split(r"should\s+see", first)[1], re.MULTILINE)


def assert_seen(example: str, printed: str) -> None:
    lines = promised(example)
    assert lines
    missing = first_missing(lines, printed)
    assert missing is None, f"{missing}\n\nis not what {example} prints:\n\n{printed}"


def test_every_example_is_run_here() -> None:
    names = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")} - SHARED
    here = Path(__file__).read_text()
    assert names
    assert not [name for name in names if f'"{name}"' not in here]
    listed = (EXAMPLES / "README.md").read_text()
    assert not [name for name in names if f"[{name}]({name})" not in listed]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["own_gpt_model.py", "hybrid_stack.py", "plain_pytorch.py"])
def test_models(example: str, run: Callable[..., str]) -> None:
    printed = run("python", "-W", "ignore", EXAMPLES / example)
    assert_seen(example, printed)
    losses = [(float(first), float(last)) for first, last in re.findall(r"loss +(\S+) -> (\S+)", printed)]
    assert all(last < first - 1 for first, last in losses)
    if example == "own_gpt_model.py":
        assert losses[0][0] == losses[1][0], "at its start the connected model is the plain one"
        assert losses[0][1] != losses[1][1]


def test_plain_pytorch_needs_no_megatron(run: Callable[..., str]) -> None:
    code = "import sys; sys.path.insert(0, 'examples'); import plain_pytorch; print(sorted(sys.modules))"
    imported = run(sys.executable, "-c", code, PYTHONPATH=ROOT)
    assert "'megatron_fc'" in imported
    assert "'megatron'" not in imported


def test_megatron_bridge(run: Callable[..., str]) -> None:
    if not any(Path(place, "bridge").is_dir() for place in megatron.__path__):
        said = run("python", EXAMPLES / "megatron_bridge.py", code=1)
        assert "examples/megatron_bridge.py needs Megatron-Bridge, and megatron.bridge is missing" in said
        pytest.skip("needs Megatron-Bridge: make test-bridge")
    assert_seen("megatron_bridge.py", run("python", "-c", BRIDGE))


@pytest.mark.slow
@pytest.mark.parametrize("checkout", [ROOT / "tests" / "support", os.environ.get("MEGATRON_LM")])
def test_pretrain_gpt(checkout: Path | str | None, run: Callable[..., str]) -> None:
    """Megatron's own script where MEGATRON_LM names a checkout; elsewhere a stand-in of what its wheel has."""
    if checkout is None:
        pytest.skip("needs a checkout of Megatron-LM: set MEGATRON_LM")
    printed = run(EXAMPLES / "pretrain_gpt.sh", MEGATRON_LM=checkout)
    assert_seen("pretrain_gpt.sh", re.sub(r"\| lm loss: (\d)\.(\d)\d*E\+00 ", r"| lm loss: \1.\2 ", printed))
    assert "number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (0, 0, 0): 99416" in printed


@pytest.mark.slow
def test_upcycle(config: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    olmo.save_model("olmoe", tmp_path / "hf", intermediate_size=32, max_position_embeddings=32, **sizes)
    smaller = ["qk_layernorm_over_heads=true", "train_iters=2", "save_interval=2"]
    words = [EXAMPLES / "upcycle.sh", tmp_path / "hf", config, *smaller]
    printed = run(*words, FOLDER=tmp_path / "runs")
    expected = promised("upcycle.sh")[0].replace("runs/upcycling", str(tmp_path / "runs"))
    assert first_missing([expected], printed) is None, printed
    assert read_metrics(tmp_path / "runs" / "dfc_x4").loss.keys() == {1, 2}
    again = run(*words, FOLDER=tmp_path / "runs")
    assert "from_residual" not in again


@pytest.mark.slow
def test_evaluate(trained: Path, config: Path, run: Callable[..., str]) -> None:
    assert_seen("evaluate.sh", run(EXAMPLES / "evaluate.sh", trained, config))


@pytest.mark.slow
def test_plot_connections(trained: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    printed = run("python", EXAMPLES / "plot_connections.py", trained, tmp_path / "learnt.png")
    sites, largest = re.fullmatch(r"(\d+) sites, 4 slots: alpha is within (\S+) of the identity.*\n", printed).groups()
    assert first_missing([promised("plot_connections.py")[0].replace("8 sites", f"{sites} sites")], printed) is None
    stored = StoredTensors(find_checkpoint(trained))
    alphas = [stored.read(key).view(-1, 4, 4) for key in sorted(stored.keys()) if key.endswith("static_alpha")]
    assert int(sites) == sum(map(len, alphas))
    assert float(largest) == pytest.approx(max((a - torch.eye(4)).abs().max().item() for a in alphas), abs=5e-4)
    assert (tmp_path / "learnt.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing_is_one_sentence(config: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    plain = evaluations.train(config, "plain", "connection=residual")
    said = run("python", EXAMPLES / "plot_connections.py", plain, tmp_path / "x.png", code=1)
    assert "plot_connections.py: " in said
    assert "has no Frac- or Hyper-Connections: give one of an sfc, dfc, shc or dhc run" in said
