"""The kernels in every parallel layout: step 0 against the torch backend on one rank."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fc import FracConfig, HyperConfig
from support import harness
from support.layouts import LAYOUTS, Layout, Model

# fp32 sums in another order; observed are 4e-6.
TOLERANCE = 1e-4


Kind = FracConfig | HyperConfig
FRAC, WIDE = FracConfig(rate=4), HyperConfig(slots=4)


def model(layout: Layout, connection: Kind, backend: str) -> Model:
    # Megatron refuses to train MoE under tensor without sequence parallelism.
    kind = "dense" if layout.name == "TP2" else "mixed"
    return Model(kind, layout.layers, replace(connection, backend=backend), "random")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


pytestmark = pytest.mark.slow
# Every kind of parallelism once; the others are for `make soak`.
ALWAYS = {
    FRAC.label: ("TP2+SP+PP2", "EP2", "CP2", "DP2 distributed optimizer, overlap"),
    WIDE.label: ("TP2+SP+PP2",),
}
CASES = [
    pytest.param(
        layout,
        connection,
        id=f"{layout.name} {connection.label}",
        marks=() if layout.name in ALWAYS[connection.label] else pytest.mark.soak,
    )
    for connection in (FRAC, WIDE)
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("layout", "connection"), CASES)
def test_kernels_in_a_layout(layout: Layout, connection: Kind, store: Path) -> None:
    reference = model(layout, connection, "torch")
    if not (store / "models" / reference.name).exists():
        harness.run("write_reference", 1, store / f"one-{reference.name}", reference, store / "models")
    folder = store / f"{layout.name} {connection.label}".replace(" ", "-")
    words = (layout, model(layout, connection, "triton"), store / "models")
    ranks = harness.run("first_step_emulated", layout.world, folder, *words)
    assert any(not math.isnan(loss) for loss, _ in ranks)
    for _, differences in ranks:
        assert max(differences.values()) < TOLERANCE
