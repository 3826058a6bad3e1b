"""`megatron-fc demo` end to end, shrunk by overrides, from a wheel with its extra `train` and in an empty folder."""

import subprocess
from pathlib import Path

import pytest

from support.wheel import Installed, build_wheel, install

SMALL = ["train_iters=4", "num_layers=1", "hidden_size=32", "num_attention_heads=2", "num_experts=2", "eval_iters=1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    return install(build_wheel(folder), folder / "environment", extra="train")


def demo(installed: Installed, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return installed.run("megatron-fc", "demo", *SMALL, *overrides, cwd=folder)


@pytest.mark.slow
def test_demo_trains_compares_and_is_not_repeated(installed: Installed, tmp_path: Path) -> None:
    first = demo(installed, tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.splitlines()[:2] == [
        f"demo    writes its data to {tmp_path}/data/demo and its runs to {tmp_path}/runs/demo; nothing is downloaded",
        "        trains residual and then dfc_x4; interrupted, the same command goes on",
    ]
    assert "Connections against plain residuals" in first.stdout
    assert "INFO:" not in first.stdout + first.stderr, "Megatron's log is the run's log"
    runs = tmp_path / "runs" / "demo"
    assert (runs / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert all((runs / name / "summary.json").exists() for name in ("residual", "dfc_x4"))
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "data"}

    second = demo(installed, tmp_path)
    assert second.returncode == 0
    assert second.stdout.count("finished before with these settings") == 2
    assert "trains residual" not in second.stdout
    assert "iteration 4/4" in first.stdout
    assert "iteration 4/4" not in second.stdout

    other = demo(installed, tmp_path, "train_iters=5")
    assert other.returncode == 2
    assert "holds a run with other settings: remove it, or give another --out" in other.stderr
