"""A checkpoint of commit 822d68f, before modules moved into rooms: one layer, DFCx2, 3 iterations, with optimizer."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_fc.connections.kinds import is_connection_key
from support.training_runs import config as config
from support.training_runs import train

ARCHIVE = Path(__file__).parent / "data" / "before_the_rooms.tar.xz"
MODEL = ("num_layers=1", "hidden_size=8", "num_experts=2", "moe_ffn_hidden_size=8", "moe_router_topk=1", "rate=2")
MODEL += ("untie_embeddings_and_output_weights=false", "make_vocab_size_divisible_by=4")
# A warmup so long that a step moves no weight by 1e-9: what is saved is what was loaded.
STILL = ("train_iters=4", "lr_warmup_iters=100000000", "lr_decay_iters=200000000", "save_interval=1", "eval_iters=0")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if hasattr(entry, "size") and not key.startswith("optimizer.") and "rng_state" not in key
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.slow
def test_a_run_goes_on_from_it_with_the_same_weights(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(run_dir / "checkpoints", filter="data")
    assert ARCHIVE.stat().st_size < 100_000
    train(config, run_dir, *MODEL, *STILL)
    start = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[0])
    assert (start["iteration"], start["consumed_samples"]) == (3, 12)
    before, after = (weights(run_dir / "checkpoints" / f"iter_000000{step}") for step in (3, 4))
    assert before.keys() == after.keys()
    assert sum(map(is_connection_key, before)) == 2 * 7
    trained = [key for key in before if is_connection_key(key) and key.endswith("static_alpha")]
    assert all(not torch.equal(before[key], torch.eye(2).flatten()) for key in trained)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-9, msg=key)
