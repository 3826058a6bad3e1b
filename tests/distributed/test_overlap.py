"""Overlapped parameter gather: every forward reads parameters that all data-parallel ranks have."""

from pathlib import Path

import pytest

from support import harness
from support.layouts import BY_NAME, model_named

pytestmark = pytest.mark.slow
MODEL = model_named("mixed2-dfc_x4-random-bf16")
PLAIN, OVERLAP = BY_NAME["DP2 distributed optimizer"], BY_NAME["DP2 distributed optimizer, overlap"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("overlap")
    harness.run("write_start", 1, store / "start", MODEL, store / "models")
    return store


def test_parameters_are_equal_at_every_forward_and_losses_as_without_overlap(store: Path) -> None:
    plain = harness.run("parameters_at_every_forward", 2, store / "plain", PLAIN, MODEL, store / "models")
    overlap = harness.run("parameters_at_every_forward", 2, store / "overlap", OVERLAP, MODEL, store / "models")
    assert overlap[0][1] == overlap[1][1], "checksums of the two ranks"
    assert len(set(overlap[0][1])) > 10, "they are updated"
    assert overlap[0][1] == plain[0][1]
    assert overlap[0][0] == plain[0][0], "losses"


def test_control_parameters_read_without_the_owners_call_are_stale(store: Path) -> None:
    ranks = harness.run("parameters_at_every_forward", 2, store / "bypass", OVERLAP, MODEL, store / "models", True)
    stale = sum(a != b for a, b in zip(ranks[0][1], ranks[1][1], strict=True))
    assert stale > len(ranks[0][1]) / 2
