"""`megatron-fc demo` end to end, shrunk by overrides."""

import os
import subprocess
from pathlib import Path

import pytest

from support import fork_server

SMALL = ["train_iters=4", "num_layers=1", "hidden_size=32", "num_attention_heads=2", "num_experts=2", "eval_iters=1"]


def demo(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = ["demo", "--out", str(folder / "runs"), "--data", str(folder / "data"), *SMALL, *overrides]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    return subprocess.run(
        [fork_server.python(), "-m", "megatron_fc", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_demo_trains_compares_and_is_not_repeated(tmp_path: Path) -> None:
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "Frac-Connections against plain residuals" in first.stdout
    assert (tmp_path / "runs" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert all((tmp_path / "runs" / name / "summary.json").exists() for name in ("residual", "dfc_x4"))

    second = demo(tmp_path)
    assert second.returncode == 0
    assert second.stdout.count("finished before with these settings") == 2
    assert "iteration 4/4" in first.stdout
    assert "iteration 4/4" not in second.stdout

    other = demo(tmp_path, "train_iters=5")
    assert other.returncode == 2
    assert "holds a run with other settings: remove it, or give another --out" in other.stderr
