"""`megatron-fc analyze` of checkpoints: against a computation by hand, and from every layout the same."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import fork_server
from support import training_runs as runs
from support.compress_commands import run
from support.evaluations import train

SAMPLES = 4
CONNECTIONS = {
    "dfc_x4": [],
    "residual": ["connection=residual"],
    "dhc_x4": ["connection=dhc"],
    "mhc_x4": ["connection=mhc"],
    "hybrid": ["family=hybrid"],
}
TP2 = ["tensor_model_parallel_size=2", "sequence_parallel=true"]
PP2 = ["pipeline_model_parallel_size=2"]
CLOSE = {"rel": 2e-4, "abs": 2e-5}  # fp32 in another order of sums


@pytest.fixture(scope="module")
def trained(config: Path) -> Callable[[str], Path]:
    """Runs whose learning rate takes the connections far from where they start, by connection."""
    made: dict[str, Path] = {}

    def run_dir(connection: str) -> Path:
        if connection not in made:
            made[connection] = train(config, connection, *CONNECTIONS[connection]).parent
        return made[connection]

    return run_dir


def analyze(what: str, run_dir: Path, out: Path, *words: object, ranks: int = 1) -> dict[str, Any]:
    done = run(out.parent, "analyze", what, run_dir, *words, "--samples", SAMPLES, "--out", out, ranks=ranks)
    assert done.code == 0, done.printed
    found: dict[str, Any] = json.loads((out / f"{what}.json").read_text())
    return found


def by_hand(config: Path, run_dir: Path, connection: str) -> dict[str, Any]:
    script = Path(__file__).parents[1] / "support" / "direct_analysis.py"
    words = [fork_server.python(), str(script), str(config), str(run_dir / "checkpoints"), str(SAMPLES)]
    done = subprocess.run(
        [*words, *CONNECTIONS[connection]], env=runs.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


IDENTITY = [[float(row == column) for column in range(4)] for row in range(4)]


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize(
    "connection",
    [
        "dfc_x4",
        pytest.param("residual", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("mhc_x4", "dhc_x4")),
    ],
)
def test_measures_are_those_by_hand(
    connection: str,
    config: Path,
    trained: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run_dir, out = trained(connection), tmp_path / "out"
    expected = by_hand(config, run_dir, connection)
    similarity = analyze("similarity", run_dir, out)
    assert similarity["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert similarity["tokens"] == SAMPLES * 32
    same([pair["median"] for pair in similarity["pairs"]], expected["medians"])
    gradients = analyze("gradients", run_dir, out)
    same([[layer["weights"], layer["connections"]] for layer in gradients["layers"]], expected["gradients"])
    elsewhere = analyze("gradients", run_dir, tmp_path / "elsewhere", "train_data_path=/not/here")
    assert elsewhere["layers"] == gradients["layers"]
    if connection == "residual":
        done = run(tmp_path, "analyze", "coefficients", run_dir, "--out", out)
        assert done.code == 2
        assert "has plain residuals, and so no coefficients: give a checkpoint with connections" in done.printed
        assert done.printed.count("\n") == 1
        return
    coefficients = analyze("coefficients", run_dir, out)
    assert len(coefficients["sites"]) == 4
    for site, by_name in zip(coefficients["sites"], expected["sites"], strict=True):
        for name, mean in by_name.items():
            same(site[name]["mean"], mean)
            assert site[name]["start"] != site[name]["mean"]
    if connection != "mhc_x4":
        sites = coefficients["sites"]
        assert all(site["alpha"]["start"] == IDENTITY and site["beta"]["start"] == [1] * 4 for site in sites)
        read = IDENTITY if connection == "dfc_x4" else [[0], [0], [1], [0]]  # by the third of them
        assert sites[2]["gamma"]["start"] == read
    for name in ("forward", "backward", "singular"):
        assert coefficients["gain"][name][0][3] == pytest.approx(expected[name], rel=1e-3)
        assert coefficients["gain"][name][3][0] is None
    page = (out / "analysis.html").read_text()
    for name in ("coefficients", "gain", "similarity", "gradients"):
        assert f'<figure id="{name}">' in page
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.partition("<main>")[2]


@pytest.mark.parametrize(
    ("connection", "layout", "ranks"),
    [
        pytest.param("dfc_x4", PP2, 2, marks=pytest.mark.soak),
        pytest.param("dhc_x4", TP2, 2, marks=pytest.mark.soak),
        pytest.param("dfc_x4", [*TP2, *PP2], 4, marks=pytest.mark.slow),
        pytest.param("dhc_x4", [*TP2, *PP2], 4, marks=pytest.mark.soak),
        pytest.param(
            "mhc_x4", [*TP2, "expert_model_parallel_size=2", "expert_tensor_parallel_size=1"], 2, marks=pytest.mark.soak
        ),
        pytest.param("residual", [*PP2, "expert_model_parallel_size=2"], 4, marks=pytest.mark.soak),
        # A batch of the run that two ranks cannot share out.
        pytest.param("dfc_x4", ["micro_batch_size=2", "global_batch_size=2"], 2, marks=pytest.mark.slow),
        pytest.param("hybrid", TP2, 2, marks=pytest.mark.soak),
    ],
)
def test_every_layout_finds_the_same(
    connection: str, layout: list[str], ranks: int, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = trained(connection)
    for what, keys in (
        ("coefficients", ["sites", "gain"]),
        ("similarity", ["pairs"]),
        ("gradients", ["layers", "ends"]),
    ):
        if connection == "residual" and what == "coefficients":
            continue
        one = analyze(what, run_dir, tmp_path / "one")
        other = analyze(what, run_dir, tmp_path / "other", *layout, ranks=ranks)
        for key in keys:
            close(other[key], one[key])


def close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        for key, value in expected.items():
            close(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)
    else:
        assert found == expected


@pytest.mark.slow
def test_other_checkpoints_stand_beside(trained: Callable[[str], Path], tmp_path: Path) -> None:
    for connection in ("residual", "dfc_x4"):
        analyze("similarity", trained(connection), tmp_path / connection)
    words = ["--out", tmp_path / "dfc_x4", "--against", tmp_path / "residual"]
    done = run(tmp_path, "analyze", "similarity", trained("dfc_x4"), "--samples", 2 * SAMPLES, *words)
    assert done.code == 0
    assert "residual is of 128 tokens, this of 256: give both the same --samples" in done.printed
    done = run(tmp_path, "analyze", "similarity", trained("dfc_x4"), "--samples", SAMPLES, *words)
    assert (done.code, done.printed.count("note: ")) == (0, 0)
    done = run(tmp_path, "analyze", "gradients", trained("dfc_x4"), "--against", tmp_path / "residual")
    assert done.code == 2
    assert "residual holds no readable gradients.json: give the --out of `analyze gradients`" in done.printed
    done = run(tmp_path, "analyze", "gradients", trained("dfc_x4"), "--out", tmp_path / "residual")
    assert done.code == 2
    assert re.search(r"holds similarity of \S+/residual/\S+, not of \S+/dfc_x4/\S+: give another --out", done.printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "0"], "--samples 0: give a number from 1 on"),
        (["context_parallel_size=2"], "context_parallel_size=2: analysis keeps sequences whole, set it to 1"),
        (["num_layers_per_virtual_pipeline_stage=1"], "=1: analysis knows no virtual pipeline stages, set it to null"),
    ],
)
def test_refusals(words: list[str], said: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    done = run(tmp_path, "analyze", "similarity", trained("dfc_x4"), *words, "--out", tmp_path / "out")
    assert done.code == 2, done.printed
    assert said in done.printed
    assert "Traceback" not in done.printed
