"""The kernels in every parallel layout: step 0 against the torch backend on one rank."""

import math
from pathlib import Path

import harness
import pytest
from layouts import LAYOUTS, Layout, Model

from megatron_fc import FracConfig

# fp32 sums in another order, the interpreter's products included; observed are 4e-6.
TOLERANCE = 1e-4


def model(layout: Layout, backend: str) -> Model:
    # Megatron refuses to train MoE under tensor without sequence parallelism.
    kind = "dense" if layout.name == "TP2" else "mixed"
    return Model(kind, layout.layers, FracConfig(rate=4, backend=backend), "random")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts and reference gradients, made by the torch backend on one rank."""
    folder = tmp_path_factory.mktemp("layouts")
    for reference in {model(layout, "torch") for layout in LAYOUTS}:
        harness.run("write_reference", 1, folder / f"one-{reference.name}", reference, folder / "models")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_kernels_in_a_layout(layout: Layout, store: Path) -> None:
    folder = store / layout.name.replace(" ", "-")
    words = (layout, model(layout, "triton"), store / "models")
    ranks = harness.run("first_step", layout.world, folder, *words, timeout=400)
    assert any(not math.isnan(loss) for loss, _ in ranks)
    for _, differences in ranks:
        assert max(differences.values()) < TOLERANCE
