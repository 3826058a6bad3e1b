"""launch/mpi.sh: MPI starts the ranks, and a run of which one is killed goes on."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from site_files import REPOSITORY, Site, samples

from megatron_fc.report.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not found: apt-get install openmpi-bin"),
]

MPI = ("mpirun", "-n", "2", "--oversubscribe", "--host", "localhost:2")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def launch(site: Site, *words: str) -> subprocess.Popen[str]:
    line = [str(REPOSITORY / "launch/mpi.sh"), *MPI, "--", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=os.environ | AS_ROOT | site.variables, **pipes)


def test_a_killed_rank_and_the_run_goes_on(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
    site.write(*samples(160), "save_interval=5")
    run_dir = tmp_path / "run"
    script = launch(site, "configs/olmoe_7b.yaml", f"run_dir={run_dir}")
    deadline = time.monotonic() + 180
    while max(read_metrics(run_dir).loss, default=0) < 7:
        assert script.poll() is None, script.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    kill_rank("1", run_dir)
    printed, _ = script.communicate(timeout=240)
    assert script.returncode == 0, printed
    assert printed.count("preflight: 2 ranks on 1 node; ") == 2
    assert printed.endswith("launch: the target is reached\n")
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts if start["event"] == "start"] == [2, 2]
    assert starts[-1]["reason"] == "target"
    assert starts[-1]["consumed_samples"] == 160


def kill_rank(rank: str, run_dir: Path) -> None:
    """Not the shell that started it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_python = f"run_dir={run_dir}" in process.cmdline() and "megatron_fc.mpi" in process.cmdline()[:4]
            if is_python and process.environ().get("OMPI_COMM_WORLD_RANK") == rank:
                process.kill()


def test_usage(site: Site) -> None:
    done = subprocess.run(
        [REPOSITORY / "launch/mpi.sh", "mpirun"],
        env=os.environ | site.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "launch: usage: launch/mpi.sh mpirun -n 16 ... -- CONFIG.yaml [key=value ...]\n"
