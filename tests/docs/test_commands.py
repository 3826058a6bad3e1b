"""Every command that README, docs, configs and launch scripts print: run as it stands, in a clone with a tiny model.

`commands.yaml` says how each is run; a command or an output that it does not know fails the test. Every text has a
clone of its own, in which its commands run from the top to the bottom.
"""

import argparse
import ast
import inspect
import json
import re
import shutil
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import fork_server
from support.documented import ROOT, chunks, commands, first_missing, snippets
from support.documents import write_documents
from support.site_files import TINY
from support.training_runs import environment

TEXTS = chunks()
TABLE = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text())
COMMANDS: dict[str, Any] = {words: {} if how == "run" else how for words, how in TABLE["commands"].items()}
OUTPUT: dict[str, str] = TABLE["output"]
PAGES = [name for name in TEXTS if name.endswith(".md")]
# What a comment repeats is run on the page.
ON_PAGES = {command for name in PAGES for chunk in TEXTS[name] for command in commands(chunk)}
# Whose commands the tests of their subject run, too, on models of their own.
SOAK = {"docs/traffic.md", "docs/upcycle.md", "configs/olmo2_1b.yaml", "configs/olmoe_7b.yaml"}

# What makes configs/demo.yaml one for a test. It keeps its heads, their size and the width of its experts; for pruning
# it has layers and experts to spare.
DEMO = {"num_layers": 1, "hidden_size": 24, "kv_channels": 32, "seq_length": 16, "max_position_embeddings": 16}
DEMO |= {"num_experts": 2, "train_iters": 6, "lr_decay_iters": 6, "lr_warmup_iters": 1, "eval_iters": 1}
DEMO |= {"save_interval": 6}
TO_PRUNE = {"num_layers": 4, "num_experts": 13}
DATA = ["train_data_path=[data/demo/train]", "valid_data_path=[data/demo/valid]", "tokenizer_model=data/demo/tokenizer"]
SAMPLES = ["train_samples=8", "lr_decay_samples=8", "lr_warmup_samples=4", "save_interval=2"]


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.soak if name in SOAK or "troubleshooting" in name else pytest.mark.slow]


VARIABLES = {
    "DEMO": " ".join(f"{name}={value}" for name, value in DEMO.items()),
    "SMALL": " ".join([*TINY, *SAMPLES, *DATA]),  # the other configs
    # What a user would write into the site file.
    "FILLED_IN": f"RUNS=/scratch/runs PYTHON=.venv/bin/python; export SBATCH_ACCOUNT=my_account SBATCH_PARTITION=h100\n"
    f"SITE_OVERRIDES=({' '.join(f"'{word}'" for word in DATA)})",
}
# What Python reads first: the demo's data are made of little text, and disks have room for the largest models.
HERE = """
import shutil
from pathlib import Path
from megatron_fc.data import corpus
corpus.installed_roots = lambda: (corpus.Root("text", Path(__file__).parent / "text"),)
shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**50, 0, 2**50)
"""


def begins(chunk: list[str]) -> str | None:
    """By which words `commands.yaml` knows the output; None if it is none."""
    return next((start for start in OUTPUT if chunk[0].startswith(start)), None)


def test_every_command_and_output_is_known() -> None:
    printed = [(name, chunk) for name, of_text in TEXTS.items() for chunk in of_text]
    lines = [(name, line) for name, chunk in printed if begins(chunk) is None for line in commands(chunk)]
    unknown = [f"{name}: {line}" for name, line in lines if line not in COMMANDS]
    assert not unknown, "say in tests/docs/commands.yaml how they are run"
    assert not COMMANDS.keys() - {line for _, line in lines}, "no text prints them any more"
    assert not OUTPUT.keys() - {begins(chunk) for _, chunk in printed}, "no text prints it any more"


def test_the_tests_that_run_the_others_exist() -> None:
    named = [how.get("test") if isinstance(how, dict) else how for how in COMMANDS.values()]
    named += [shown for shown in OUTPUT.values() if shown.startswith("tests/")]
    for test in filter(None, named):
        file, _, name = test.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, test


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `data/demo` and `src`, documents, of all clones, and the text that they are made of."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "text").mkdir()
    (folder / "sitecustomize.py").write_text(HERE)
    lines = [line for module in (argparse, inspect, typing) for line in inspect.getsource(module).splitlines()]
    for start in range(0, len(lines), 50):
        (folder / "text" / f"{start}.py").write_text("\n".join(lines[start : start + 50]))
    texts = [path.read_text() for path in sorted((folder / "text").iterdir())]
    for half in range(2):
        write_documents(folder / "src" / f"{half}.jsonl", texts[half::2])
    environ = environment() | {"PYTHONPATH": f"{folder}:{ROOT}"}
    subprocess.run([fork_server.python(), "-m", "megatron_fc", "data", "demo"], cwd=folder, env=environ, check=True)
    return folder


@pytest.fixture
def clone(data: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has after `git clone` and an installation, with the demo's config shrunk."""
    for path in ("benchmarks", "megatron_fc", "pyproject.toml", "constraints.txt", "Makefile"):
        (tmp_path / path).symlink_to(ROOT / path)
    for path in ("configs", "launch"):
        shutil.copytree(ROOT / path, tmp_path / path, ignore=shutil.ignore_patterns("site.sh"))
    (tmp_path / "data").mkdir()
    for path in ("data/demo", "src"):
        (tmp_path / path).symlink_to(data / path)
    shrink(tmp_path / "configs" / "demo.yaml", TO_PRUNE if name == "docs/modelopt.md" else {})
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    scripts = {"python": "", "megatron-fc": "-m megatron_fc", "torchrun": "-m torch.distributed.run"}
    scripts = {program: f'exec {fork_server.python()} {words} "$@"' for program, words in scripts.items()}
    # This machine may have no cluster; tests/launch has one.
    for program, script in (scripts | {"sbatch": ""}).items():
        (programs / program).write_text(f"#!/bin/bash\n{script}\n")
        (programs / program).chmod(0o755)
    (programs.parent / ".installed").touch()
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(data), prepend=":")
    if name == "docs/traffic.md":
        monkeypatch.setenv("INTERPRETED", fork_server.python(TRITON_INTERPRET="1"))
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    return tmp_path


def shrink(config: Path, more: dict[str, int]) -> None:
    """Write other values at their places."""
    sections = yaml.safe_load(config.read_text())
    places = {"kv_channels": "model"} | {name: section for section, values in sections.items() for name in values}
    for name, value in (DEMO | more).items():
        sections[places[name]][name] = value
    config.write_text(yaml.safe_dump(sections))


def run(command: str, folder: Path, how: dict[str, Any]) -> str:
    """Give the command to a shell; returns what it prints."""
    words = re.sub(r" \[[^]]*\]", "", command)
    for blank, value in how.get("give", {}).items():
        words = words.replace(blank, value)
    line = ["bash", "-c", f"{words} {how.get('more', '')}"]
    done = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == how.get("code", 0), f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in TEXTS])
def test_commands_do_what_the_text_says(name: str, clone: Path) -> None:
    printed: dict[str, str] = {}
    for chunk in TEXTS[name]:
        start = begins(chunk)
        for command in commands(chunk) if start is None else []:
            how = COMMANDS[command]
            if isinstance(how, dict) and (name in PAGES or command not in ON_PAGES):
                printed[command] = run(command, clone, how)
                if how.get("table"):
                    rows = [line for line in printed[command].splitlines() if line.startswith("|")]
                    assert "\n".join(rows) in (ROOT / name).read_text(), printed[command]
        if start is not None and not OUTPUT[start].startswith("tests/"):
            source = OUTPUT[start]
            if source not in printed:
                printed[source] = run(source, clone, {})
            missing = first_missing(chunk, printed[source])
            assert missing is None, f"{missing}\n\nis not what {source} prints:\n\n{printed[source]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["docs/train.md"])
def test_a_training_with_a_callback(name: str, clone: Path) -> None:
    (script,) = snippets()[name]
    (clone / "train.py").write_text(script)
    run("python train.py", clone, {})
    said = re.findall("^new: (.*)", (clone / "runs/announced/logs/rank0.log").read_text(), re.MULTILINE)
    assert said == [f"runs/announced/checkpoints/iter_000000{iteration}" for iteration in (3, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["docs/plan.md"])
def test_a_script_of_plans(name: str, clone: Path) -> None:
    (script,) = snippets()[name]
    (clone / "plans.py").write_text(script)
    rows = re.findall(r"^(\d+) ([\d.]+) ", run("python plans.py", clone, {}), re.MULTILINE)
    assert [nodes for nodes, _ in rows] == ["8", "16", "32"]
    asked = "megatron-fc plan configs/olmoe_7b.yaml micro_batch_size=1 --nodes 32 --gpu h100 --json"
    assert float(rows[-1][1]) == json.loads(run(asked, clone, {}))["tokens_per_second"]
