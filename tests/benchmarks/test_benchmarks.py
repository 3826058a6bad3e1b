"""The GPU benchmarks from end to end on a CPU, where they show that they run and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clock
import options
from support import fork_server

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDTH, TOKENS, M = 64, 4, 4

FC = {"fused kernels", "torch backend", "eager reference", "torch.compile of the reference"}
NORMS = {"Megatron, torch norm", "Megatron, TE norm", "Megatron, fused_residual_rmsnorm"}
FAMILY = {"Liger mHC, 4 streams: not FC", "hyper-connections, num_fracs: not FC"}
CONTESTANTS = {
    "layer": FC | NORMS | FAMILY | {"fused kernels, no boundary"},
    "boundary": FC | NORMS,
    "width+norm": FC | NORMS,
    "depth": FC | {"Megatron, bias-dropout-add"},
    "width": FC,
}


def run(*words: str, interpret: str = "1") -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # kernels.py measures torch.compile, too, which the server has turned off.
    python = sys.executable if words[0] == "kernels.py" else fork_server.python(TRITON_INTERPRET=interpret)
    done = subprocess.run([python, *words], cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def result(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    (stored,), (page,) = folder.glob(f"{name}-*.json"), folder.glob(f"{name}-*.md")
    return json.loads(stored.read_text()), page.read_text()


def names_its_machine(stored: dict[str, Any], page: str, script: str) -> None:
    assert f"python benchmarks/{script} --device cpu" in stored["command"]
    assert stored["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"machine", "date", "commit"} <= stored.keys()
    for fact in ("machine", "command", "date", "commit"):
        assert stored[fact] in page
    assert "says anything of a GPU" in page


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("results")
    size = ("--widths", str(WIDTH), "--tokens", str(TOKENS), "--connections", f"dfc_x{M}", "--rounds", "1")
    run("kernels.py", "--device", "cpu", *size, "--output", str(folder))
    return result(folder, "kernels")


@pytest.mark.soak
def test_every_contestant_is_measured_or_absent_for_a_reason(operations: tuple[dict[str, Any], str]) -> None:
    stored, page = operations
    names_its_machine(stored, page, "kernels.py")
    found: dict[str, set[str]] = {}
    for row in stored["rows"]:
        found.setdefault(row["operation"], set()).add(row["contestant"])
        measured = row["direct_forward_ms"] is not None and row["direct_backward_ms"] is not None
        assert measured != bool(row["absent"] or row["error"]), row
        assert row["contestant"] in page
        if row["ours"] and row["operation"] != "boundary":
            assert measured
    assert found == CONTESTANTS


@pytest.mark.slow
def test_our_streams_and_gradients_are_the_references(operations: tuple[dict[str, Any], str]) -> None:
    layers = [row for row in operations[0]["rows"] if row["operation"] == "layer" and row["ours"]]
    assert len(layers) == 3
    assert all(0 < row["difference"] < 3e-2 for row in layers)


@pytest.mark.slow
def test_counted_bytes_and_rates(operations: tuple[dict[str, Any], str]) -> None:
    row, beta, alpha = 2 * WIDTH * TOKENS, 4 * M * TOKENS, 4 * M * M * TOKENS
    c = WIDTH // M
    site = 4 * (M * (2 * M + 1) + c * (2 * M + 1) + 2 + c)
    normed = site + 2 * WIDTH
    norms = 2 * (2 * WIDTH + 4 * TOKENS)  # their weights in bf16, and per token an fp32 statistic that is kept
    expected = {
        ("width", "fused kernels"): (2 * row + beta + alpha + site, 4 * row + beta + 2 * site),
        ("width+norm", "fused kernels"): (2 * row + beta + alpha + normed, 4 * row + beta + 2 * normed),
        ("depth", "fused kernels"): (3 * row + beta + alpha, 3 * row + 2 * beta),
        ("boundary", "fused kernels"): (4 * row + 2 * (beta + alpha) + normed, 6 * row + 3 * beta + 2 * normed),
        ("layer", "fused kernels"): (9 * row + 4 * (beta + alpha) + 2 * normed, 13 * row + 6 * beta + 4 * normed),
        ("layer", "fused kernels, no boundary"): (
            10 * row + 4 * (beta + alpha) + 2 * normed,
            14 * row + 6 * beta + 4 * normed,
        ),
        ("layer", "Megatron, torch norm"): (10 * row + norms, 12 * row + norms + 4 * WIDTH),
        ("layer", "Megatron, fused_residual_rmsnorm"): (10 * row + norms, 8 * row + norms + 4 * WIDTH),
        ("layer", "Liger mHC, 4 streams: not FC"): (20 * row, 30 * row),
    }
    found = {(row["operation"], row["contestant"]): row for row in operations[0]["rows"]}
    for key, counted in expected.items():
        assert (found[key]["bytes_forward"], found[key]["bytes_backward"]) == counted, key
    fused = found["layer", "fused kernels"]
    assert fused["forward_gb_per_s"] == pytest.approx(fused["bytes_forward"] / fused["direct_forward_ms"] / 1e6)


@pytest.mark.slow
def test_training_step(tmp_path: Path) -> None:
    shape = ("--rounds", "1", "--steps", "1", "--micro-batches", "1", "--layers", "1")
    run("step.py", "--device", "cpu", *shape, "--output", str(tmp_path))
    stored, page = result(tmp_path, "step")
    names_its_machine(stored, page, "step.py")
    rows = {row["contestant"]: row for row in stored["rows"]}
    assert list(rows) == ["residual", "residual, fused_residual_rmsnorm", "dfc_x4, triton", "dfc_x4, torch"]
    assert "Transformer Engine" in rows.pop("residual, fused_residual_rmsnorm")["absent"]
    for row in rows.values():
        assert not row["error"]
        assert len(row["step_ms"]) == stored["rounds"] == 1
        assert all(0 < part < whole for part, whole in zip(row["gradients_ms"], row["step_ms"], strict=True))
        assert f"{row['tokens_per_s']:,.0f}" in page
    assert rows["residual"]["throughput_against_residual"] == 1


BUDGET = """
import options, step, olmoe, rank, torch
from megatron_fc import FracConfig

with rank.one_rank():
    everyone = list(step.contestants(FracConfig(rate=4, backend="torch"), olmoe.TINY, "cpu", ["bf16"], False))
    entrants = [entrant for entrant in everyone if not entrant[0].absent]
    setting = step.Setting(olmoe.TINY, torch.randint(128, (1, 1, olmoe.TINY.sequence + 1)), 1)
    budget = options.Budget(1e9)
    for number in range(2):
        for row in step.compete(entrants, 1, setting, number, budget):
            step.conclude([row for row, _ in everyone], 1)
            if number == 1:
                budget.seconds = 0.0
for row, _ in everyone:
    print("values:", len(row.step_ms), row.throughput_against_residual is not None)
"""


@pytest.mark.slow
def test_nothing_is_begun_after_the_budget() -> None:
    """Of the second round one turn, not that of the residual model; figures are there after every turn."""
    printed = run("-c", BUDGET)
    values = [line.removeprefix("values: ") for line in printed.splitlines() if line.startswith("values:")]
    assert sorted(values) == ["0 False", "1 True", "1 True", "2 True"]
    assert printed.count("not begun, the budget of 0 s would not do") == 1
    assert "not measured" in run("step.py", "--device", "cpu", "--budget", "0")


MODEL_AFTER_MODEL = """
import gc, torch, olmoe, rank
from megatron_fc import FracConfig

def stored():
    gc.collect()
    storages = (t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

with rank.one_rank():
    for frac in (None, FracConfig(rate=4, backend="torch")):
        trainee = olmoe.Trainee(olmoe.TINY, 1, frac)
        trainee.step(torch.randint(128, (1, 1, 9)))
        before = stored()
        trainee.free()
        del trainee
        print("left:", stored() / before)
"""


@pytest.mark.slow
def test_a_model_gives_its_memory_back() -> None:
    """Or the second one would not fit on the card."""
    lines = run("-c", MODEL_AFTER_MODEL).splitlines()
    left = [float(line.removeprefix("left:")) for line in lines if line.startswith("left:")]
    assert len(left) == 2
    assert max(left) < 0.05


def test_without_a_device_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit) as left:
        options.parse(options.parser("about"))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--device cpu" in said


def test_results_of_a_cpu_are_not_kept_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu"])
    assert options.parse(options.parser("about")).output is None


def test_one_that_fails_does_not_end_the_contest() -> None:
    calls = []

    def second_time_lost() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("lost")

    functions = {"good": lambda: None, "bad": second_time_lost}
    times = clock.take_turns(functions, torch.device("cpu"), rounds=3, stream_bytes=0)
    assert len(times["good"].direct) == 3
    assert not times["good"].error
    assert times["bad"].error == "ValueError: lost"
    assert times["bad"].direct == []


@pytest.mark.slow
def test_shares(tmp_path: Path) -> None:
    """What decides most comes first."""
    printed = run("shares.py", "--device", "cpu", "--output", str(tmp_path), interpret="0")
    stored, page = result(tmp_path, "shares")
    names_its_machine(stored, page, "shares.py")
    first, second = stored["rows"]
    assert (first["kernel"], first["width"], first["rate"], first["slots"]) == ("boundary backward", 2048, 4, 4)
    assert second["kernel"] == "width backward"
    for row in (first, second):
        assert row["measured"] is None
        assert row["ms"] > 0
        assert not row["error"]
    assert "boundary backward, d = 2048, m = 4, n = 4" in printed
