"""launch/mpi.sh: MPI starts the ranks, and a run of which one is killed goes on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.disk import SlowDisk
from support.patience import PATIENCE, wait_for_iteration, wait_until
from support.site_files import REPOSITORY, Site, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not found: apt-get install openmpi-bin"),
]

MPI = ("mpirun", "-n", "2", "--oversubscribe", "--host", "localhost:2")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def launch(site: Site, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    line = [str(REPOSITORY / "launch/mpi.sh"), *before, *MPI, "--", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=os.environ | AS_ROOT | site.variables, **pipes)


def test_a_killed_rank_and_the_run_goes_on(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
    disk = SlowDisk(tmp_path / "seconds")
    disk.hangs_at(10)
    site.write(*samples(80), "save_interval=5", more=disk.exports)
    run_dir = tmp_path / "run"
    script = launch(site, "configs/olmoe_7b.yaml", f"run_dir={run_dir}")
    wait_for_iteration(run_dir, 10, script)
    kill_rank("1", run_dir)
    disk.is_well()
    printed, _ = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0, printed
    assert printed.count("preflight: 2 ranks on 1 node; ") == 2
    assert printed.endswith("launch: the target is reached\n")
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    began = [(start["world_size"], start["iteration"]) for start in starts if start["event"] == "start"]
    # The checkpoint of iteration 10 is complete or not, as the other rank gets on before it hears of the loss.
    assert began in ([(2, 0), (2, 5)], [(2, 0), (2, 10)])
    assert starts[-1]["reason"] == "target"
    assert starts[-1]["consumed_samples"] == 80


def kill_rank(rank: str, run_dir: Path) -> None:
    """Not the shell that started it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_python = f"run_dir={run_dir}" in process.cmdline() and "megatron_fc.mpi" in process.cmdline()[:5]
            if is_python and process.environ().get("OMPI_COMM_WORLD_RANK") == rank:
                process.kill()


def python(program: Path, *lines: str) -> str:
    """Make a program that stands in Python's place and does these lines instead of training; the site's line for it."""
    text = ["#!" + sys.executable, "import os, signal, sys, time", 'if sys.argv[3] == "preflight": sys.exit()', *lines]
    program.write_text("\n".join(text))
    program.chmod(0o755)
    return f"PYTHON={program}\n"


def test_the_sites_environment_and_the_neighbouring_gpu(site: Site, tmp_path: Path) -> None:
    """mpirun hands on what it gets, so it gets nothing here, as a remote host would."""
    pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
    run_dir = tmp_path / "run"
    lines = (
        "from megatron_fc.mpi import join",
        "join()",
        'rank, gpu = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])',
        'print("rank", rank, "on GPU", gpu, os.environ["NETWORK"], flush=True)',
        # mpirun ends all as soon as one has ended so.
        f'open(f"{tmp_path}/{{rank}}-{{gpu}}", "w").close()',
        f'while not os.path.exists(f"{tmp_path}/{{1 - rank}}-{{1 - gpu}}"): time.sleep(0.01)',
        f'sys.exit(17 if os.path.exists("{run_dir}/shift") else 16)',
    )
    site.write(more=f"{python(tmp_path / 'python', *lines)}export NETWORK='ib 0'\n")
    nothing = ("env", "-i", f"PATH={os.environ['PATH']}", *(f"{name}={value}" for name, value in AS_ROOT.items()))
    script = launch(site, "configs/olmoe_7b.yaml", f"run_dir={run_dir}", before=nothing)
    printed, _ = script.communicate(timeout=PATIENCE)
    assert script.returncode == 3, printed
    gpus = sorted(line for line in printed.splitlines() if line.startswith("rank "))
    assert gpus == [f"rank {rank} on GPU {gpu} ib 0" for rank in (0, 1) for gpu in (0, 1)]


def test_told_to_end_it_says_that_the_run_is_not_done(site: Site, tmp_path: Path) -> None:
    lines = (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit())",
        f'open("{tmp_path}/waits", "w")',
        "signal.pause()",
    )
    site.write(more=python(tmp_path / "python", *lines))
    script = launch(site, "configs/olmoe_7b.yaml", f"run_dir={tmp_path / 'run'}")
    wait_until((tmp_path / "waits").exists, "a rank that waits")
    time.sleep(1)  # the other rank
    script.terminate()
    printed, _ = script.communicate(timeout=PATIENCE)
    assert "ended with code 0 after TERM, not at the target" in printed
    assert script.returncode == 75, printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "usage: launch/mpi.sh mpirun -n 16 ... -- CONFIG.yaml [key=value ...]"),
        (
            ("--", "configs/olmoe_7b.yaml", "--nodes=8"),
            "--nodes=8: nothing is submitted here, and what starts the ranks stands before --",
        ),
    ],
)
def test_usage(site: Site, words: tuple[str, ...], sentence: str) -> None:
    site.write()
    line = [REPOSITORY / "launch/mpi.sh", "mpirun", *words]
    done = subprocess.run(line, env=os.environ | site.variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"launch: {sentence}\n")
