"""`--spec megatron_fc.megatron.specs NAME` as an unmodified pretrain_gpt.py or pretrain_hybrid.py takes it."""

import sys
from argparse import Namespace

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import import_module
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.arguments import parse_args, validate_args

from megatron_fc import FracConfig, FracConnection, UserError
from megatron_fc.megatron import specs
from megatron_fc.megatron.flags import add_frac_args, frac_config_from_args, frac_flags, stored_frac_config
from megatron_fc.megatron.parameter_order import frac_parameters_first
from support import tiny

FLAGS = """--num-layers 3 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16
--max-position-embeddings 16 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
--untie-embeddings-and-output-weights --micro-batch-size 2 --train-iters 1 --lr 1e-3 --vocab-size 128
--tokenizer-type NullTokenizer --distributed-backend gloo --use-cpu-initialization --transformer-impl local
--attention-backend unfused --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
--no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --attention-dropout 0 --hidden-dropout 0"""
MOE = "--num-experts 4 --moe-router-topk 2 --moe-layer-freq ([0]*1+[1]*2) --moe-ffn-hidden-size 32"


def parse(monkeypatch: pytest.MonkeyPatch, extra: str, provider: object = None) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *FLAGS.split(), *extra.split()])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse_args(extra_args_provider=provider)
    validate_args(args, {})
    return args


def build_gpt(args: Namespace) -> torch.nn.Module:
    """What Megatron's training does with the model config."""
    config = gpt_config_from_args(args)
    config.vocab_size = 128
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert config.pre_wrap_hooks == [frac_parameters_first], "Megatron runs it before it wraps the model"
    return model


def sites(model: torch.nn.Module) -> list[FracConnection]:
    return [module for module in model.modules() if isinstance(module, FracConnection)]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dfc_x2", FracConfig(rate=2)),
        ("dfc_x4", FracConfig(rate=4)),
        ("dfc_x8", FracConfig(rate=8)),
        ("sfc_x2", FracConfig(rate=2, dynamic=False)),
        ("sfc_x4", FracConfig(rate=4, dynamic=False)),
    ],
)
def test_gpt_with_a_moe_pattern(name: str, config: FracConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, f"{MOE} --spec megatron_fc.megatron.specs {name}")
    model = build_gpt(args)
    assert [site.config for site in sites(model)] == [config] * 6
    assert [layer.is_moe_layer for layer in model.decoder.layers] == [False, True, True]
    assert tiny.logits(model, tiny.tokens()).shape == (2, tiny.SEQUENCE, 128)


def test_hybrid_takes_the_attribute_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hybrid_dfc_x2", "hybrid_dfc_x4", "hybrid_dfc_x8", "hybrid_sfc_x2", "hybrid_sfc_x4"):
        spec = import_module(("megatron_fc.megatron.specs", name))
        norm = spec.submodules.moe_layer.submodules.pre_mlp_layernorm
        assert norm.params["frac"].label == name.removeprefix("hybrid_")
    flags = f"{MOE} --hybrid-layer-pattern *-*E --spec megatron_fc.megatron.specs hybrid_dfc_x4"
    config = hybrid_config_from_args(parse(monkeypatch, flags))
    config.vocab_size = 128
    config.position_embedding_type = "rope"
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert len(sites(model)) == 4


def test_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--frac-rate 2 --frac-norm layernorm --no-frac-tanh --frac-initial-scale 0.1"
    args = parse(monkeypatch, f"{flags} --spec megatron_fc.megatron.specs from_args", add_frac_args)
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    expected = FracConfig(rate=2, norm="layernorm", tanh=False, initial_scale=0.1)
    assert {site.config for site in sites(build_gpt(args))} == {expected}


@pytest.mark.parametrize(
    "config",
    [
        FracConfig(),
        FracConfig(rate=2, dynamic=False),
        FracConfig(rate=8, norm="none", tanh=False, scale=False, norm_eps=1e-6),
        FracConfig(dynamic=False, recompute=True),
    ],
)
def test_flags_round_trip(config: FracConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, " ".join(frac_flags(config)), add_frac_args)
    read_back = frac_config_from_args(args)
    assert read_back is not None
    assert read_back.to_dict() == config.to_dict()


def test_arguments_kept_by_an_older_release_have_fewer_options() -> None:
    assert stored_frac_config(Namespace(frac_rate=2, frac_dynamic=False)) == FracConfig(rate=2, dynamic=False)
    assert stored_frac_config(Namespace(frac_rate=None)) is None
    assert stored_frac_config(Namespace()) is None


def test_without_a_rate_the_residuals_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "", add_frac_args)
    assert frac_config_from_args(args) is None
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    with pytest.raises(UserError, match="from_args needs --frac-rate"):
        specs.from_args(None)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [("use_megatron_fsdp", True, "use_megatron_fsdp with"), ("use_torch_fsdp2", True, "use_torch_fsdp2 wants")],
)
def test_training_options_that_do_not_go_with_it(
    setting: str, value: object, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(monkeypatch, "--frac-rate 4 --bf16 --overlap-moe-expert-parallel-comm", add_frac_args)
    setattr(args, setting, value)
    with pytest.raises(UserError, match=sentence):
        frac_config_from_args(args)


def test_mtp_layers_that_spec_cannot_reach_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "--mtp-num-layers 1 --spec megatron_fc.megatron.specs dfc_x4")
    with pytest.warns(UserWarning, match="multi-token-prediction layers keep plain residuals"):
        model = build_gpt(args)
    assert len(sites(model)) == 6
