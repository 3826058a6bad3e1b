"""`megatron-fc train` under torchrun, on the cards of this machine."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_fc.runs.metrics import read_metrics
from support.training_runs import command, environment


def losses(config: Path, run_dir: Path, ranks: int, *overrides: str, variables: Mapping[str, str] = {}) -> torch.Tensor:
    """Train; returns the loss of each iteration."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = command(config, f"run_dir={run_dir}", *overrides)
    done = subprocess.run(
        [*launcher, *arguments[1:]],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(list(read_metrics(run_dir).loss.values()))
