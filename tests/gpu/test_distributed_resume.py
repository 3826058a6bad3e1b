"""Resume with the distributed optimizer in bf16, which Megatron can do with Transformer Engine or Apex only.

Not run yet: it needs a card. What the CPU lane shows of these checkpoints is in `tests/megatron/test_order.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pretrain import command, environment

# The fixture; pytest finds it by its name here.
from test_pretrain import config as config

from megatron_fc.megatron.environment import has_apex, has_transformer_engine
from megatron_fc.report.metrics import read_metrics

pytestmark = pytest.mark.gpu

HALF, ALL = 6, 12
# A learning rate at which a lost moment or main copy shows within a few iterations.
OPTIONS = ("bf16=true", "use_distributed_optimizer=true", "lr=1.0e-2", "lr_warmup_iters=0", f"lr_decay_iters={ALL}")
OPTIONS = (*OPTIONS, f"save_interval={HALF}", "eval_iters=0")
CLOSE = 5e-3  # sums on a card have no fixed order, in bf16


def losses(config: Path, run_dir: Path, ranks: int, *overrides: str) -> torch.Tensor:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = command(config, f"run_dir={run_dir}", *OPTIONS, *overrides)
    done = subprocess.run(
        [*launcher, *arguments[1:]], env=environment(), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(list(read_metrics(run_dir).loss.values()))


@pytest.mark.parametrize("family", ["gpt", "hybrid"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_has_the_losses_of_the_straight_one(ranks: int, family: str, config: Path, tmp_path: Path) -> None:
    if not (has_transformer_engine() or has_apex()):
        pytest.skip("needs Transformer Engine or Apex")
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    chosen = f"family={family}"
    straight = losses(config, tmp_path / "straight", ranks, chosen, f"train_iters={ALL}")
    assert len(straight) == ALL
    losses(config, tmp_path / "run", ranks, chosen, f"train_iters={HALF}")
    resumed = losses(config, tmp_path / "run", ranks, chosen, f"train_iters={ALL}")
    torch.testing.assert_close(resumed, straight, rtol=0, atol=CLOSE)
    # Control: with an optimizer that begins anew the losses are others.
    losses(config, tmp_path / "fresh", ranks, chosen, f"train_iters={HALF}")
    fresh = losses(config, tmp_path / "fresh", ranks, chosen, f"train_iters={ALL}", "no_load_optim=true")
    assert (fresh - straight)[HALF + 1 :].abs().max() > 2 * CLOSE
