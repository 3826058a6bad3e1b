"""Training options that Frac-Connections refuse by name, and their neighbours that they take."""

from argparse import Namespace
from typing import Any

import pytest

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.megatron.refusals import (
    refuse_unsupported_args,
    refuse_with_connection,
    refuse_with_stream_layers,
)
from support import tiny

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


def test_a_stage_of_the_embedding_alone_in_the_combined_schedule() -> None:
    """It would leave out the decoder, in which the stream begins."""
    alone = {"pipeline_model_parallel_layout": "E|tt|L", "overlap_moe_expert_parallel_comm": True, "hidden_size": 64}
    with pytest.raises(UserError, match="a stage of the embedding alone, where the stream of dhc_x4 begins: give"):
        refuse_with_connection(args(**alone), HyperConfig())
    refuse_with_connection(args(**alone), FracConfig())
    refuse_with_connection(args(**alone | {"pipeline_model_parallel_layout": "Et|t|L"}), HyperConfig())
    refuse_with_connection(args(**alone | {"overlap_moe_expert_parallel_comm": False}), HyperConfig())


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recompute_granularity": "full"}, "recompute_granularity=full keeps one stream per recomputed part"),
        (LAYERNORM, r"recompute_modules=\['layernorm'\] runs the width connection again"),
        ({"cuda_graph_impl": "local"}, r".*cuda_graph_impl=local\) cannot compute streams of other layers"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm cuts the graph"),
        ({"cpu_offloading_num_layers": 1}, "cpu_offloading would move sub-layers' outputs"),
        (FSDP, "use_megatron_fsdp releases parameters of other layers"),
        ({"use_torch_fsdp2": True, "bf16": False}, "use_torch_fsdp2 releases parameters of other layers"),
    ],
)
def test_what_does_not_go_with_recompute_of_the_stream(options: dict[str, Any], sentence: str) -> None:
    for config in (HyperConfig(stream_layers=2), ManifoldConfig(stream_layers=2)):
        with pytest.raises(UserError, match=f"stream_layers=2 of {config.label}: {sentence}") as error:
            refuse_with_stream_layers(args(**options), config)
        assert "\n" not in str(error.value)
        refuse_with_stream_layers(args(**options), type(config)())


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_a_layer_refuses_it_too(granularity: str) -> None:
    """Where a model is built without Megatron's training arguments."""
    options = {"recompute_granularity": granularity, "recompute_modules": ["layernorm"]}
    if granularity == "full":
        options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with pytest.raises(UserError, match="stream_layers=2 of dhc_x4: recompute_"):
        tiny.build("dense", HyperConfig(stream_layers=2), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe", "mlp"]},
        {"recompute_granularity": "selective", "recompute_modules": None},
        {"cuda_graph_impl": "full_iteration"},
        {"overlap_param_gather": True},
    ],
)
def test_what_goes_with_it(options: dict[str, Any]) -> None:
    refuse_with_stream_layers(args(**options), HyperConfig(stream_layers=2))
