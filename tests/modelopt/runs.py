"""A tiny trained MoE with Frac-Connections, and one with plain residuals, for every test that compresses a run."""

from pathlib import Path
from typing import Any

import pytest
import test_pretrain
from commands import run

config = test_pretrain.config
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


def tensors(checkpoint: Path) -> dict[str, Any]:
    """The model's tensors in a checkpoint, quantizers included."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(checkpoint))
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return {key: loaded[key] for key in stored if not key.startswith("optimizer.")}
