"""One option switches FP8 and FP4, and what cannot run is one sentence before anything is built."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_fc import UserError
from megatron_fc.cli.main import main
from megatron_fc.training.megatron_arguments import megatron_arguments
from megatron_fc.training.precision import PRECISIONS, refuse_impossible, refuse_on_device, refuse_unquantizable
from megatron_fc.training.recipe import load_recipe

CONFIG = Path(__file__).parents[2] / "configs" / "olmoe_7b.yaml"
ADA, HOPPER, BLACKWELL, GEFORCE_BLACKWELL = (8, 9), (9, 0), (10, 0), (12, 0)
MLA = ("multi_latent_attention=true", "group_query_attention=false", "q_lora_rank=1536", "kv_lora_rank=512")
MLA = (*MLA, "qk_head_dim=128", "qk_pos_emb_head_dim=64", "v_head_dim=128")
LOW = [name for name in PRECISIONS if name != "bf16"]


def args(precision: str, *overrides: str) -> Namespace:
    """Megatron's own arguments for the paper's 7B model in a precision."""
    recipe = load_recipe(CONFIG, [f"precision={precision}", *overrides], elsewhere=True)
    return megatron_arguments().parse(recipe.argv)


@pytest.mark.parametrize(
    ("precision", "fp8", "recipe", "fp4"),
    [
        ("bf16", None, "delayed", None),
        ("fp8_delayed", "hybrid", "delayed", None),
        ("fp8_tensorwise", "hybrid", "tensorwise", None),
        ("fp8_blockwise", "e4m3", "blockwise", None),
        ("mxfp8", "e4m3", "mxfp8", None),
        ("nvfp4", None, "delayed", "e2m1"),
    ],
)
def test_one_option_becomes_megatrons_flags(precision: str, fp8: str | None, recipe: str, fp4: str | None) -> None:
    found = args(precision)
    assert (found.fp8, found.fp8_recipe, found.fp4) == (fp8, recipe, fp4)
    assert found.bf16
    if precision == "fp8_delayed":
        assert (found.fp8_amax_history_len, found.fp8_amax_compute_algo) == (1024, "max")


def test_megatrons_own_options_go_with_it() -> None:
    overrides = ("fp8_param_gather=true", "first_last_layers_bf16=true", "moe_router_padding_for_quantization=true")
    found = args("fp8_tensorwise", *overrides)
    assert found.fp8_param_gather
    assert found.first_last_layers_bf16
    assert found.moe_router_padding_for_quantization


@pytest.mark.parametrize(
    ("precision", "runs_on"),
    [
        ("bf16", [(7, 0), ADA, HOPPER, BLACKWELL, GEFORCE_BLACKWELL]),
        ("fp8_delayed", [ADA, HOPPER, BLACKWELL, GEFORCE_BLACKWELL]),
        ("fp8_tensorwise", [ADA, HOPPER, BLACKWELL, GEFORCE_BLACKWELL]),
        ("fp8_blockwise", [HOPPER]),
        ("mxfp8", [BLACKWELL, (10, 3)]),
        ("nvfp4", [BLACKWELL, GEFORCE_BLACKWELL]),
    ],
)
def test_devices(precision: str, runs_on: list[tuple[int, int]]) -> None:
    found = args(precision)
    for capability in ((7, 0), (8, 0), ADA, HOPPER, BLACKWELL, (10, 3), GEFORCE_BLACKWELL):
        if capability in runs_on or precision == "bf16" or (capability == (10, 3) and BLACKWELL in runs_on):
            refuse_on_device(found, capability)
        else:
            major, minor = capability
            with pytest.raises(UserError, match=rf"needs a GPU of .* this one has {major}\.{minor}: use precision="):
                refuse_on_device(found, capability)


@pytest.mark.parametrize("precision", LOW)
def test_the_cpu_lane_has_none_of_them(precision: str) -> None:
    with pytest.raises(UserError, match="needs a GPU, and torch sees no CUDA device: use precision=bf16"):
        refuse_on_device(args(precision), None)
    refuse_on_device(args("bf16"), None)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["precision=fp8"], "unknown precision 'fp8'"),
        (["precision=mxfp8", "fp8_recipe=delayed"], "fp8_recipe=delayed contradicts precision=mxfp8: drop one"),
        (["precision=bf16", "fp8_format=hybrid"], "fp8_format=hybrid contradicts precision=bf16"),
        (["precision=mxfp8", "fp16=true"], "fp16=True contradicts precision=mxfp8"),
        (["precision=mxfp8", "bf16=false"], "bf16=False contradicts precision=mxfp8"),
        (["precision=fp8_delayed", "fp4_format=e2m1"], "fp4_format=e2m1 contradicts precision=fp8_delayed"),
        (["precision=null", "fp8_format=hybrid", "fp4_format=e2m1"], "fp8_format=hybrid and fp4_format=e2m1 exclude"),
        (["fp8_param_gather=true"], "fp8_param_gather keeps weights in a precision that is not on: set precision"),
        (["precision=mxfp8", "fp4_param_gather=true"], "fp4_param_gather keeps weights in a precision that is not on"),
        (
            ["precision=fp8_delayed", "fp8_param_gather=true", "use_distributed_optimizer=false"],
            "fp8_param_gather needs master weights of the distributed optimizer: set use_distributed_optimizer",
        ),
        (["moe_router_padding_for_quantization=true"], "pads for FP8 or FP4, which is not on: set precision"),
        (["precision=mxfp8", "transformer_impl=local"], "fp8_recipe=mxfp8 has no effect on Megatron's local layers"),
        (["precision=fp8_delayed", "first_last_layers_bf16=true"], "first_last_layers_bf16 .* use precision=fp8_tens"),
        (
            ["precision=fp8_delayed", "recompute_granularity=selective", "recompute_modules=[layernorm]"],
            r"recompute_modules=\['layernorm'\] does not go with delayed scaling",
        ),
        (
            ["precision=fp8_tensorwise", "micro_batch_size=1", "seq_length=4088"],
            r"multiples of 16, and micro_batch_size x seq_length / \(CP x TP\) is 4088",
        ),
        (["precision=fp8_blockwise", "context_parallel_size=512", "micro_batch_size=1"], "is 8: change it"),
        (
            ["precision=mxfp8", "tensor_model_parallel_size=4", "seq_length=64", "micro_batch_size=1"],
            "multiples of 32, and micro_batch_size x seq_length / .* is 16",
        ),
        (["precision=fp8_tensorwise", "hidden_size=2056", "num_attention_heads=8"], "and hidden_size is 2056"),
        (["precision=fp8_tensorwise", "moe_ffn_hidden_size=1000"], "and moe_ffn_hidden_size / ETP is 1000"),
        (
            ["precision=fp8_tensorwise", "ffn_hidden_size=1000", "moe_layer_freq='([0]+[1]*15)'"],
            "and ffn_hidden_size / TP is 1000",
        ),
        (
            ["precision=fp8_tensorwise", "ffn_hidden_size=1000", "family=hybrid", "moe_layer_freq=2"],
            "and ffn_hidden_size / TP is 1000",
        ),
        (["precision=fp8_tensorwise", *MLA, "q_lora_rank=1000"], "and q_lora_rank is 1000"),
        (["precision=fp8_tensorwise", *MLA, "kv_lora_rank=520"], "and kv_lora_rank is 520"),
        (["precision=mxfp8", *MLA, "qk_pos_emb_head_dim=16"], r"and kv_lora_rank \+ qk_pos_emb_head_dim is 528"),
        (
            ["precision=fp8_tensorwise", *MLA, "v_head_dim=8", "tensor_model_parallel_size=16"],
            "and heads x .qk_head_dim . v_head_dim. / TP is 136",
        ),
        (
            ["precision=fp8_tensorwise", "tensor_model_parallel_size=16", "kv_channels=8"],
            "and heads x kv_channels / TP is 8",
        ),
    ],
)
def test_refused_before_anything_is_built(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_recipe(CONFIG, overrides, elsewhere=True)


def test_deepseeks_latent_attention_divides() -> None:
    load_recipe(CONFIG, ["precision=mxfp8", *MLA], elsewhere=True)


def test_a_width_that_no_layer_uses_does_not_count() -> None:
    for family in ("gpt", "hybrid"):
        overrides = ["precision=fp8_tensorwise", "ffn_hidden_size=1000", f"family={family}"]
        load_recipe(CONFIG, overrides, elsewhere=True)


def test_sequence_parallelism_divides_the_tokens_of_a_rank() -> None:
    overrides = ["precision=mxfp8", "tensor_model_parallel_size=4", "seq_length=64", "micro_batch_size=1"]
    load_recipe(CONFIG, [*overrides, "sequence_parallel=false"], elsewhere=True)


@pytest.mark.parametrize("precision", LOW)
def test_transformer_engine_missing_is_exit_2_and_one_sentence(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(CONFIG), f"precision={precision}"]) == 2
    error = capsys.readouterr().err
    assert "needs Transformer Engine, which is not installed: install it" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("precision", LOW)
def test_quantizers_of_modelopt_do_not_go_with_it(precision: str) -> None:
    refuse_unquantizable(args("bf16"))
    with pytest.raises(UserError, match=r"_recipe=\w+ is Transformer Engine's .* add precision=bf16 fp8_param_gather="):
        refuse_unquantizable(args(precision))
    args(precision, "precision=bf16", "fp8_param_gather=false")


def test_a_recipe_of_ones_own_is_left_to_megatron() -> None:
    own: dict[str, Any] = {**vars(args("fp8_tensorwise")), "fp8_recipe": "custom"}
    refuse_impossible(Namespace(**own))
    refuse_on_device(Namespace(**own), HOPPER)
