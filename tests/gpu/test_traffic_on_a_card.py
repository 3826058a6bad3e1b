"""A profile on a card: kernel times beside bytes, and Nsight's command lines where its tools are.

Not run yet: it needs a card. What the CPU lane shows is in `tests/profiling/test_profile.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fc.planning.counts import total_device
from megatron_fc.profiling.counters.nsight import read_dram
from megatron_fc.profiling.files import read_report
from support.training_runs import config as config  # the fixture that makes a tiny config and its data
from support.training_runs import environment

pytestmark = pytest.mark.gpu

MODEL = ("bf16=true", "hidden_size=512", "moe_ffn_hidden_size=512", "transformer_impl=local", "connection=dfc")


def megatron_fc(*words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_fc", "traffic", "run", *words]


def test_kernels_have_times_and_speeds_below_a_copys(config: Path, tmp_path: Path) -> None:
    subprocess.run([*megatron_fc(str(config), *MODEL), "--out", tmp_path], env=environment(), check=True, timeout=600)
    report = read_report(tmp_path)
    (rank,) = report.ranks
    assert report.run.device != "cpu"
    assert rank.copy_bytes_per_second is not None
    assert rank.copy_bytes_per_second > 1e11
    total = total_device(rank.kinds.values())
    assert total.seconds is not None
    assert 0 < total.seconds < sum(rank.step_seconds)
    assert (total.read_bytes + total.written_bytes) / total.seconds < 2 * rank.copy_bytes_per_second
    assert any(warning.startswith("Counted without torch.compile") for warning in report.warnings())
    assert "of a copy&#x27;s" in (tmp_path / "traffic.html").read_text()


def test_ncu_measures_the_same_window(config: Path, tmp_path: Path) -> None:
    if shutil.which("ncu") is None:
        pytest.skip("ncu not found: install Nsight Compute")
    words = megatron_fc(str(config), *MODEL, "--out", str(tmp_path), "--steps", "1")
    lines = subprocess.run([*words, "--nsight"], env=environment(), capture_output=True, text=True, check=True).stdout
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    variables = environment() | {"PATH": path, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29431"}
    subprocess.run(lines.splitlines()[1], shell=True, env=variables, check=True, timeout=1800)
    measured = read_dram(tmp_path / "rank-0.csv")
    places = [place for place in measured if place is not None]
    assert {place.phase for place in places} == {"forward", "backward", "optimizer"}
    assert any("connection" in place.module for place in places)
