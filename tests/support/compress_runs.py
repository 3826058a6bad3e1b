"""A tiny trained MoE with Frac-Connections, and one with plain residuals, for every test that compresses a run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from support import training_runs
from support.compress_commands import run

config = training_runs.config
ITERATIONS = 40


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """Checkpoints of a DFCx4 run."""
    return _trained(config, "dfc_x4")


@pytest.fixture(scope="module")
def plain(config: Path) -> Path:
    """Checkpoints of its residual twin."""
    return _trained(config, "residual", "connection=residual")


def _trained(config: Path, name: str, *overrides: str) -> Path:
    run_dir = config.parent / name
    options = [*overrides, f"run_dir={run_dir}", f"save_interval={ITERATIONS}"]
    done = run(config.parent, "train", config, *options, "--brief")
    assert done.code == 0, done.printed
    return run_dir / "checkpoints"


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, quantizers included."""
    reader = FileSystemReader(checkpoint)
    found = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    load(found, storage_reader=reader, no_dist=True)
    return found
