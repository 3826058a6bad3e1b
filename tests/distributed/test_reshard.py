"""A checkpoint of one layout continues under another as if nothing had happened."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import harness
from support.layouts import BY_NAME, ONE_RANK, Layout, model_named

pytestmark = pytest.mark.slow
MODEL = model_named("mixed4-dfc_x4-random-fp32")
HALF, ALL = 4, 8
TOLERANCE = 1e-5  # as in test_layouts

PAIRS = [
    (ONE_RANK, BY_NAME["TP2+SP"], True),
    (BY_NAME["TP2+SP"], ONE_RANK, True),
    (BY_NAME["TP2+SP"], BY_NAME["PP2"], True),
    (BY_NAME["PP2"], BY_NAME["PP2+VPP2"], True),
    (BY_NAME["PP2+VPP2"], BY_NAME["TP2+SP+PP2"], True),
    (BY_NAME["TP2+SP+PP2"], BY_NAME["CP2"], True),
    (BY_NAME["DP2"], BY_NAME["PP4"], True),
    # Megatron cannot move optimizer state between numbers of expert ranks.
    (BY_NAME["PP2"], BY_NAME["EP2"], False),
    (BY_NAME["EP2"], BY_NAME["TP2+SP+EP2"], False),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("reshard")
    harness.run("write_start", 1, store / "start", MODEL, store / "models")
    return store


@pytest.fixture(scope="module")
def uninterrupted(store: Path) -> list[float]:
    arguments = (ONE_RANK, MODEL, store / "models", store / "checkpoint-uninterrupted", ALL)
    return harness.run("train_and_save", 1, store / "uninterrupted", *arguments)[0]


def _losses(ranks: list[list[float]]) -> list[float]:
    return next(losses for losses in ranks if not math.isnan(losses[0]))


@pytest.fixture(scope="module")
def checkpoint(store: Path) -> Any:
    """A checkpoint after half of the steps, made once per layout."""

    def make(layout: Layout) -> Path:
        path = store / f"checkpoint-{layout.name}"
        if not path.exists():
            folder = store / f"save-{layout.name}"
            harness.run("train_and_save", layout.world, folder, layout, MODEL, store / "models", path, HALF)
        return path

    return make


@pytest.mark.parametrize(("saved", "loaded", "optimizer"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_continuation_equals_the_uninterrupted_run(
    saved: Layout, loaded: Layout, optimizer: bool, store: Path, uninterrupted: list[float], checkpoint: Any
) -> None:
    folder = store / f"{saved.name}-to-{loaded.name}"
    # Without optimizer state only the first loss can be the same: it is taken before the first update.
    steps = range(HALF, ALL) if optimizer else range(HALF, HALF + 1)
    arguments = (loaded, MODEL, store / "models", checkpoint(saved), steps, optimizer)
    losses = _losses(harness.run("load_and_train", loaded.world, folder, *arguments))
    assert losses == pytest.approx(uninterrupted[HALF : steps.stop], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "saved", "loaded"),
    [
        ("mixed4-dhc_x4-random-fp32", BY_NAME["TP2+SP"], BY_NAME["PP2+VPP2"]),
        ("mixed4-mhc_x4-learned-random-fp32", BY_NAME["PP2"], BY_NAME["TP2+SP"]),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_wider_streams_continue_under_another_layout(name: str, saved: Layout, loaded: Layout, tmp_path: Path) -> None:
    model, models, path = model_named(name), tmp_path / "models", tmp_path / "saved"
    reference = harness.run("train_and_save", 1, tmp_path / "one", ONE_RANK, model, models, tmp_path / "all", ALL)[0]
    harness.run("train_and_save", saved.world, tmp_path / "save", saved, model, models, path, HALF)
    arguments = (loaded, model, models, path, range(HALF, ALL), True)
    losses = _losses(harness.run("load_and_train", loaded.world, tmp_path / "load", *arguments))
    assert losses == pytest.approx(reference[HALF:], abs=TOLERANCE)


def test_connections_are_stored_once(checkpoint: Any) -> None:
    """Replicated over tensor ranks: one piece in the file, of the tensor's own size."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(str(checkpoint(BY_NAME["TP2+SP+PP2"]))).read_metadata().state_dict_metadata
    tensors = {key: value for key, value in metadata.items() if ".connection." in key and hasattr(value, "chunks")}
    model = {key: value for key, value in tensors.items() if not key.startswith("optimizer.")}
    assert len(model) == 7 * 8, "seven parameters, two sites in each of four layers"
    for key, value in tensors.items():
        assert len(value.chunks) == 1, key
        assert value.chunks[0].sizes == value.size, key


def test_every_rank_refuses_what_one_of_them_finds_corrupt(checkpoint: Any, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(checkpoint(BY_NAME["TP2+SP+PP2"]), tmp_path / "iter_0000004"))
    assert harness.run("refusal_of", 2, tmp_path / "intact", damaged) == ["", ""]
    shard = damaged / "__2_0.distcp"
    content = bytearray(shard.read_bytes())
    content[content.index(b"data/0FB") + 100] ^= 1  # in the values of a tensor
    shard.write_bytes(content)
    first, second = harness.run("refusal_of", 2, tmp_path / "corrupt", damaged)
    assert first == second
    assert first.startswith(f"{shard} is corrupt at ")
