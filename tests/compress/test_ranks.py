"""Quantising, pruning and distilling on two ranks over gloo: what one rank does, whichever way the model is split."""

import re
from pathlib import Path

import pytest
import torch

from megatron_fc.checkpoints.location import latest_checkpoint
from support.compress_commands import run
from support.compress_runs import config, tensors, trained  # noqa: F401  (fixtures)

pytestmark = pytest.mark.modelopt

DENSE = ["num_experts=null", "moe_ffn_hidden_size=null", "moe_router_topk=null", "ffn_hidden_size=64"]


def done(config: Path, *words: object, ranks: int = 2) -> str:  # noqa: F811
    """Run a command to its end; returns what it printed."""
    ended = run(config.parent, *words, ranks=ranks)
    assert ended.code == 0, ended.printed
    return ended.printed


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"│ +(\d+\.\d{4}) │", printed)]


@pytest.mark.parametrize("split", ["expert_model_parallel_size=2", "pipeline_model_parallel_size=2"])
def test_split_model_is_quantised_and_trains_on(split: str, config: Path, trained: Path) -> None:  # noqa: F811
    target = config.parent / split.partition("=")[0]
    quantise = ["quantize", trained, config, "--recipe", "fp8", "--calibration-iters", "2", "--to"]
    whole = config.parent / "on_one_rank"
    if not whole.exists():
        done(config, *quantise, whole, ranks=1)
    printed = done(config, *quantise, target, split)
    assert len(losses(printed)) == 2
    expected, found = tensors(latest_checkpoint(whole)), tensors(latest_checkpoint(target))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    run_dir = config.parent / f"{target.name}_trained"
    options = ["finetune=true", f"run_dir={run_dir}", "train_iters=2", "save_interval=2"]
    done(config, "train", config, split, f"load={target}", *options)
    assert tensors(latest_checkpoint(run_dir / "checkpoints")).keys() == expected.keys()


def test_data_parallel_ranks_prune_by_the_scores_of_all(config: Path, trained: Path) -> None:  # noqa: F811
    sizes = ["num_experts=2", "moe_ffn_hidden_size=16", "num_attention_heads=1"]
    words = ["prune", trained, config, "--calibration-iters", "2", "--export", *sizes, "--to"]
    one, two = (config.parent / f"pruned_{ranks}" for ranks in (1, 2))
    expected = losses(done(config, *words, one, ranks=1))
    assert losses(done(config, *words, two)) == pytest.approx(expected, abs=2e-4)
    found = tensors(latest_checkpoint(two))
    for key, tensor in tensors(latest_checkpoint(one)).items():
        assert torch.equal(found[key], tensor), key


def test_divergence_over_a_split_vocabulary(config: Path) -> None:  # noqa: F811
    """Of two given models: what begins anew begins otherwise in another layout."""
    for name, seed in (("teacher", 1), ("student", 2)):
        options = [f"run_dir={config.parent / name}", f"seed={seed}", "train_iters=2", "save_interval=2"]
        done(config, "train", config, *DENSE, *options, ranks=1)
    teacher, student = (config.parent / name / "checkpoints" for name in ("teacher", "student"))
    found = []
    for ranks in (1, 2):
        run_dir = config.parent / f"split_{ranks}"
        # Padded to the same vocabulary.
        split = [f"tensor_model_parallel_size={ranks}", f"make_vocab_size_divisible_by={128 // ranks}"]
        options = [f"load={student}", "finetune=true", f"run_dir={run_dir}", "train_iters=3"]
        done(config, "distill", config, *DENSE, *split, *options, "--teacher", teacher, ranks=ranks)
        log = (run_dir / "logs" / f"rank{ranks - 1}.log").read_text()
        found.append([float(value) for value in re.findall(r"\| distillation loss: (\S+) \|", log)])
    one, two = found
    assert len(one) == 3
    assert one[0] > 0.01
    assert two == pytest.approx(one, rel=1e-3)
