"""Resume and reshard with the distributed optimizer, which Megatron can do with Transformer Engine or Apex only.

In bf16 and in FP8, whose scaling history and parameters are in the checkpoint too.

Not run yet: it needs a card. `tests/megatron/test_parameter_order.py` has what the CPU lane shows.
"""

from pathlib import Path

import pytest
import torch

from megatron_fc.training.machine import has_apex, has_transformer_engine
from support.launched import losses

# The fixture; pytest finds it by its name here.
from support.training_runs import config as config

pytestmark = pytest.mark.gpu

HALF, ALL = 6, 12
# A learning rate at which a lost moment or main copy shows within a few iterations.
OPTIONS = ("use_distributed_optimizer=true", "lr=1.0e-2", "lr_warmup_iters=0", f"lr_decay_iters={ALL}")
OPTIONS = (*OPTIONS, f"save_interval={HALF}", "eval_iters=0")
PRECISIONS = {
    "bf16": ("precision=bf16",),
    "fp8_delayed": ("precision=fp8_delayed",),
    "fp8_tensorwise": ("precision=fp8_tensorwise",),
    "fp8_tensorwise, FP8 parameters": ("precision=fp8_tensorwise", "fp8_param_gather=true"),
}
# Sums on a card have no fixed order; FP8 has 3 bits of mantissa where bf16 has 7.
CLOSE = {name: 5e-3 if name == "bf16" else 2e-2 for name in PRECISIONS}


def run(config: Path, run_dir: Path, ranks: int, *overrides: str) -> torch.Tensor:
    # Megatron asks for it with tensor parallelism before Blackwell.
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return losses(config, run_dir, ranks, *OPTIONS, *overrides, variables=connections)


def skip_unless_possible(ranks: int, precision: str) -> None:
    if not (has_transformer_engine() or has_apex()):
        pytest.skip("needs Transformer Engine or Apex")
    if precision != "bf16" and not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    if precision != "bf16" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8")
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")


@pytest.mark.parametrize(
    ("family", "precision"),
    [("gpt", "bf16"), ("hybrid", "bf16"), *(("gpt", name) for name in PRECISIONS if name != "bf16")],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_has_the_losses_of_the_straight_one(
    ranks: int, family: str, precision: str, config: Path, tmp_path: Path
) -> None:
    skip_unless_possible(ranks, precision)
    chosen, close = (f"family={family}", *PRECISIONS[precision]), CLOSE[precision]
    straight = run(config, tmp_path / "straight", ranks, *chosen, f"train_iters={ALL}")
    assert len(straight) == ALL
    run(config, tmp_path / "run", ranks, *chosen, f"train_iters={HALF}")
    resumed = run(config, tmp_path / "run", ranks, *chosen, f"train_iters={ALL}")
    torch.testing.assert_close(resumed, straight, rtol=0, atol=close)


def test_an_optimizer_that_begins_anew_shows(config: Path, tmp_path: Path) -> None:
    """The control: else the losses above would be the same whatever is loaded."""
    skip_unless_possible(1, "bf16")
    chosen = PRECISIONS["bf16"]
    straight = run(config, tmp_path / "straight", 1, *chosen, f"train_iters={ALL}")
    run(config, tmp_path / "fresh", 1, *chosen, f"train_iters={HALF}")
    fresh = run(config, tmp_path / "fresh", 1, *chosen, f"train_iters={ALL}", "no_load_optim=true")
    assert (fresh - straight)[HALF + 1 :].abs().max() > 2 * max(CLOSE.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", [(), ("tensor_model_parallel_size=2", "sequence_parallel=true")], ids=["DP2", "TP2"])
def test_a_checkpoint_of_one_rank_goes_on_on_two(
    layout: tuple[str, ...], precision: str, config: Path, tmp_path: Path
) -> None:
    skip_unless_possible(2, precision)
    # Optimizer states that any layout can read.
    chosen = (*PRECISIONS[precision], "dist_ckpt_optim_fully_reshardable=true")
    straight = run(config, tmp_path / "straight", 1, *chosen, f"train_iters={ALL}")
    run(config, tmp_path / "run", 1, *chosen, f"train_iters={HALF}")
    resumed = run(config, tmp_path / "run", 2, *chosen, *layout, f"train_iters={ALL}")
    torch.testing.assert_close(resumed, straight, rtol=0, atol=2 * CLOSE[precision])
