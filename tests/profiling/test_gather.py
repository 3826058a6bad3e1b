"""Gathering, also without a rank, over torch.distributed and over MPI."""

import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.multiprocessing as processes

from support.patience import PATIENCE

_A_RANK_OF_MPI = """
import sys, time
from datetime import timedelta
from mpi4py import MPI
from megatron_fc.profiling.gather import OverMpi, make_gatherer
rank = MPI.COMM_WORLD.Get_rank()
gatherer = make_gatherer(timedelta(seconds=float(sys.argv[1])))
assert isinstance(gatherer, OverMpi)
if rank != int(sys.argv[2]):
    texts = gatherer.gather(f"part {rank}")
    print("\\n".join(sorted(texts)), flush=True)
"""


def _rank(rank: int, ranks: int, folder: str, absent: int | None, seconds: float) -> None:
    import torch.distributed as dist

    from megatron_fc.profiling.gather import OverTorch, make_gatherer

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    gatherer = make_gatherer(timedelta(seconds=seconds))
    assert isinstance(gatherer, OverTorch)
    texts = []
    if rank == absent:
        time.sleep(seconds)  # an end at once could meet the others still connecting to it
    else:
        texts = gatherer.gather(f"part {rank}")
    Path(folder, f"gathered-{rank}").write_text("\n".join(texts))
    os._exit(0)  # without the others


@pytest.mark.parametrize(
    ("absent", "seconds", "gathered"),
    [(None, 60.0, "part 0\npart 1\npart 2"), pytest.param(1, 2.0, "", marks=pytest.mark.slow)],
)
def test_over_torch(absent: int | None, seconds: float, gathered: str, tmp_path: Path) -> None:
    processes.spawn(_rank, (3, str(tmp_path), absent, seconds), nprocs=3)
    assert [Path(tmp_path, f"gathered-{rank}").read_text() for rank in range(3)] == [gathered, "", ""]


@pytest.mark.parametrize(
    ("absent", "seconds", "gathered"),
    [(-1, 60, "part 0\npart 1\npart 2"), pytest.param(1, 3, "part 0\npart 2", marks=pytest.mark.slow)],
)
def test_over_mpi(absent: int, seconds: int, gathered: str) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun not found: apt-get install openmpi-bin")
    program = [sys.executable, "-c", _A_RANK_OF_MPI, str(seconds), str(absent)]
    command = ["mpirun", "-n", "3", "--oversubscribe", "--host", "localhost:3", *program]
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    assert done.stdout.strip() == gathered
