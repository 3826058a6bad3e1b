"""Training options that Frac-Connections refuse by name, and their neighbours that they take."""

from argparse import Namespace
from typing import Any

import pytest

from megatron_fc import UserError
from megatron_fc.megatron.refusals import refuse_unsupported_args

FSDP = {"use_megatron_fsdp": True}
LAYERNORM = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}


def args(**options: Any) -> Namespace:
    return Namespace(
        **{
            "optimizer": "adam",
            "bf16": True,
            "fp16": False,
            "save": None,
            "no_save_optim": None,
            "ckpt_format": "torch_dist",
            "use_distributed_optimizer": True,
            **options,
        }
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"optimizer": "muon", "decoupled_lr": 0.01},
            "optimizer=muon leaves the connections' matrices to Adam .* drop decoupled_lr",
        ),
        ({"use_torch_fsdp2": True}, "use_torch_fsdp2 wants one parameter dtype"),
        ({**FSDP, **LAYERNORM}, "use_megatron_fsdp takes a gradient .* set recompute of FracConfig"),
        ({**FSDP, "overlap_moe_expert_parallel_comm": True}, "use_megatron_fsdp with overlap_moe_expert_parallel_comm"),
    ],
)
def test_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        refuse_unsupported_args(args(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        LAYERNORM,
        FSDP,
        {**FSDP, "recompute_granularity": "full", "recompute_modules": ["layernorm"]},
        {**FSDP, "recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"overlap_moe_expert_parallel_comm": True},
        {"optimizer": "muon"},
        {"decoupled_lr": 0.01},
        {"use_torch_fsdp2": True, "bf16": False},
    ],
)
def test_taken(options: dict[str, Any]) -> None:
    refuse_unsupported_args(args(**options))
