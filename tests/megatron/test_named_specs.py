"""`--spec megatron_fc.megatron.specs NAME` as Megatron-LM's unmodified scripts take it, called or as it is."""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.spec_utils import import_module
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from torch.distributed.checkpoint import save as save_in_torchs_format

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.site import Site
from megatron_fc.megatron import specs
from megatron_fc.megatron.flags import add_connection_args, connection_flags, connection_from_args, stored_connection
from megatron_fc.megatron.norm_over_heads import NormOverHeads
from megatron_fc.megatron.parameter_order import connection_parameters_first
from megatron_fc.megatron.refusals import refuse_unsupported_args
from support import tiny

SPEC = "--spec megatron_fc.megatron.specs"
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
    monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", args)
    return args


def build_gpt(args: Namespace) -> torch.nn.Module:
    """What Megatron's training does with the model config."""
    config = gpt_config_from_args(args)
    config.vocab_size = 128
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert config.pre_wrap_hooks == [connection_parameters_first], "Megatron runs it before it wraps the model"
    return model


def build_uncalled(args: Namespace) -> torch.nn.Module:
    """What Megatron-LM's `gpt_builders.gpt_builder` does, which pretrain_vlm.py, train_rl.py and many forks call."""
    spec = import_module(args.spec)
    if hasattr(spec, "layer_specs"):
        assert spec.layer_specs
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return GPTModel(core_transformer_config_from_args(args), spec, 128, 16, position_embedding_type="rope")


def build_hybrid(args: Namespace) -> torch.nn.Module:
    destroy_moe_metrics_tracker()  # it is global and sized for the number of layers that it saw first
    config = hybrid_config_from_args(args)
    config.vocab_size = 128
    config.position_embedding_type = "rope"
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def sites(model: torch.nn.Module) -> list[Site]:
    return [module for module in model.modules() if isinstance(module, Site)]


# A member of every kind, by its label.
FAMILY: dict[str, ConnectionConfig] = {
    "dfc_x4": FracConfig(rate=4),
    "sfc_x2": FracConfig(rate=2, dynamic=False),
    "shc_x2": HyperConfig(slots=2, dynamic=False),
    "dhc_x4": HyperConfig(slots=4),
    "dhc_x4_m2": HyperConfig(slots=4, fractions=2),
    "mhc_x4": ManifoldConfig(slots=4),
    "mfc_x4": ManifoldConfig(slots=4, fractions=4),
}


@pytest.mark.parametrize(("name", "config"), FAMILY.items(), ids=FAMILY)
def test_gpt_with_a_moe_pattern(name: str, config: ConnectionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, f"{MOE} --spec megatron_fc.megatron.specs {name}")
    model = build_gpt(args)
    assert [site.config for site in sites(model)] == [config] * 6
    assert [layer.is_moe_layer for layer in model.decoder.layers] == [False, True, True]
    assert tiny.logits(model, tiny.tokens()).shape == (2, tiny.SEQUENCE, 128)


def test_hybrid_takes_the_attribute_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for label, config in FAMILY.items():
        spec = import_module(("megatron_fc.megatron.specs", f"hybrid_{label}"))
        norm = spec.submodules.moe_layer.submodules.pre_mlp_layernorm
        assert norm.params["connection"] == config
    for label in ("dfc_x4", "mhc_x4"):
        flags = f"{MOE} --hybrid-layer-pattern *-*E --spec megatron_fc.megatron.specs hybrid_{label}"
        assert [site.config for site in sites(build_hybrid(parse(monkeypatch, flags)))] == [FAMILY[label]] * 4


def test_flags_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--frac-rate 2 --frac-norm layernorm --no-frac-tanh --frac-initial-scale 0.1"
    args = parse(monkeypatch, f"{flags} --spec megatron_fc.megatron.specs from_args", add_connection_args)
    expected = FracConfig(rate=2, norm="layernorm", tanh=False, initial_scale=0.1)
    assert {site.config for site in sites(build_gpt(args))} == {expected}
    wide = f"--manifold-slots 2 --manifold-leave learned {SPEC} from_args"
    model = build_gpt(parse(monkeypatch, wide, add_connection_args))
    assert {site.config for site in sites(model)} == {ManifoldConfig(slots=2, leave="learned")}
    assert model.decoder.final_layernorm.connection.leave_weight.shape == (2, 2 * 64)


@pytest.mark.parametrize(
    "config",
    [
        FracConfig(),
        FracConfig(rate=2, dynamic=False),
        FracConfig(rate=8, norm="none", tanh=False, scale=False, norm_eps=1e-6),
        FracConfig(dynamic=False, recompute=True),
        HyperConfig(),
        HyperConfig(slots=2, stream_layers=3),
        HyperConfig(slots=8, fractions=2, dynamic_beta=False, norm_affine=False),
        ManifoldConfig(),
        ManifoldConfig(slots=2, leave="learned", sinkhorn_iterations=7, sinkhorn_eps=1e-5),
        ManifoldConfig(slots=8, fractions=8),
    ],
    ids=str,
)
def test_flags_round_trip(config: ConnectionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, " ".join(connection_flags(config)), add_connection_args)
    read_back = connection_from_args(args)
    assert read_back is not None
    assert (type(read_back), read_back.to_dict()) == (type(config), config.to_dict())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--frac-rate 0", "rate must be a whole number of at least 1, not 0: use 4"),
        ("--hyper-slots 0", "slots must be a whole number of at least 1, not 0: use 4"),
        ("--hyper-slots 4 --hyper-fractions 3", "slots=4 is no multiple of fractions=3: use slots=6"),
        ("--hyper-slots 4 --hyper-fractions 4", r"a Frac-Connection: use dfc or sfc, FracConfig\(rate=4\)"),
        ("--manifold-slots 4 --manifold-fractions 2", r"fractions=2 is neither 1 \(mHC\) nor slots=4 \(mFC\)"),
        ("--frac-rate 4 --hyper-slots 4", "--frac-rate and --hyper-slots choose two kinds of connections: keep one"),
        ("--hyper-slots 4 --manifold-slots 4", "--hyper-slots and --manifold-slots choose two kinds"),
        ("--hyper-slots 4 --frac-recompute", "--frac-recompute is an option of another kind .* than dhc_x4: drop it"),
        ("--frac-rate 4 --manifold-leave learned", "--manifold-leave is an option of another kind .* than dfc_x4"),
        ("--no-hyper-tanh", "--hyper-tanh has no effect without --hyper-slots: set that, or drop it"),
        ("--hyper-slots 4 --cuda-graph-impl local", "cuda_graph_impl=local captures layers .* dhc_x4 has 256 values"),
        ("--manifold-fractions 4", "--manifold-fractions has no effect without --manifold-slots"),
    ],
)
def test_flags_that_make_no_connection(flags: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, flags, add_connection_args)
    with pytest.raises(UserError, match=f"^.*{sentence}"):
        connection_from_args(args)


def test_arguments_kept_by_an_older_release_have_fewer_options() -> None:
    assert stored_connection(Namespace(frac_rate=2, frac_dynamic=False)) == FracConfig(rate=2, dynamic=False)
    assert stored_connection(Namespace(hyper_slots=2, frac_rate=None)) == HyperConfig(slots=2)
    assert stored_connection(Namespace(frac_rate=None)) is None
    assert stored_connection(Namespace()) is None


def test_without_a_rate_the_residuals_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "", add_connection_args)
    assert connection_from_args(args) is None
    with pytest.raises(UserError, match="from_args needs a kind: set --frac-rate, --hyper-slots or --manifold-slots"):
        specs.from_args(None)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [("use_megatron_fsdp", True, "use_megatron_fsdp with"), ("use_torch_fsdp2", True, "use_torch_fsdp2 wants")],
)
def test_training_options_that_do_not_go_with_it(
    setting: str, value: object, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(monkeypatch, "--frac-rate 4 --bf16 --overlap-moe-expert-parallel-comm", add_connection_args)
    setattr(args, setting, value)
    with pytest.raises(UserError, match=sentence):
        connection_from_args(args)


def test_mtp_layers_that_spec_cannot_reach_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "--mtp-num-layers 1 --spec megatron_fc.megatron.specs dfc_x4")
    with pytest.warns(UserWarning, match="multi-token-prediction layers keep plain residuals"):
        model = build_gpt(args)
    assert len(sites(model)) == 6


@pytest.mark.parametrize("flags", ["", MOE], ids=["one layer for all", "a pattern"])
@pytest.mark.parametrize("label", ["dfc_x4", "dhc_x4", "mfc_x4"])
def test_a_script_that_takes_a_spec_as_it_is(label: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = build_gpt(parse(monkeypatch, f"{flags} {SPEC} {label}"))
    args = parse(monkeypatch, f"{flags} {SPEC} layer_{label}")
    model = build_uncalled(args)
    assert [site.config for site in sites(model)] == [FAMILY[label]] * 6
    model.load_state_dict(called.state_dict())
    assert torch.equal(tiny.logits(model, tiny.tokens()), tiny.logits(called, tiny.tokens()))
    # Nothing there arranges the order that the distributed optimizer needs.
    args.bf16, args.save, args.use_distributed_optimizer = True, "somewhere", True
    with pytest.raises(UserError, match="a --spec that the script does not call"):
        refuse_unsupported_args(args, on_gpu=True)


def test_pretrain_vlm_looks_into_a_layer_and_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, f"{SPEC} layer_sfc_x2")
    spec = import_module(args.spec)
    spec.submodules.self_attention.params["attn_mask_type"] = "another"
    assert spec.submodules.self_attention.params["attn_mask_type"] == "another"
    assert spec.submodules.mlp
    parse(monkeypatch, f"{SPEC} layer_sfc_x2")
    assert spec.submodules.self_attention.params["attn_mask_type"] != "another", "another run's model"


def test_layers_of_virtual_stages_that_differ_need_a_builder_that_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, f"{MOE} {SPEC} layer_dfc_x4")
    args.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(UserError, match="layer_dfc_x4 does not know for which virtual pipeline stage"):
        build_uncalled(args)


@pytest.mark.parametrize(("name", "build"), [("dhc_x4", build_gpt), ("layer_dhc_x4", build_uncalled)])
def test_flags_beside_a_name_are_refused(
    name: str, build: Callable[[Namespace], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be stamped on checkpoints of another connection."""
    args = parse(monkeypatch, f"--hyper-slots 2 {SPEC} {name}", add_connection_args)
    with pytest.raises(UserError, match=rf"--hyper-slots .* beside --spec {name}: drop the flags, or"):
        build(args)
    build(parse(monkeypatch, f"--hyper-slots 4 {SPEC} {name}", add_connection_args))


def test_flags_reach_specs_that_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = FracConfig(rate=2, tanh=False)
    flags = "--frac-rate 2 --no-frac-tanh"
    model = build_uncalled(parse(monkeypatch, f"{flags} {SPEC} layer_from_args", add_connection_args))
    assert {site.config for site in sites(model)} == {expected}
    flags = f"{flags} {MOE} --hybrid-layer-pattern *-*E {SPEC} hybrid_from_args"
    assert {site.config for site in sites(build_hybrid(parse(monkeypatch, flags, add_connection_args)))} == {expected}


def test_the_number_of_slots_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, f"{SPEC} dfc_x16")
    assert {site.config.label for site in sites(build_gpt(args))} == {"dfc_x16"}
    with pytest.raises(UserError, match="rate=3 does not divide hidden_size=64"):
        build_gpt(parse(monkeypatch, f"{SPEC} dfc_x3"))
    for name, sentence in {
        "dhc_x4_m3": "rate=4 is no multiple of fractions=3: use rate=6",
        "dfc_x4_m2": "fractions=2 is an option of shc and dhc: dfc_x4 has its own, drop it",
        "hybrid_mhc_x4_m2": "fractions=2 is an option of shc and dhc: mhc_x4 has its own, drop it",
    }.items():
        with pytest.raises(UserError, match=f"^{sentence}$"):
            getattr(specs, name)


HYBRID = "--hybrid-layer-pattern *-*-"


@pytest.mark.parametrize(
    ("build", "flags", "sentence"),
    [
        (
            build_uncalled,
            "dfc_x4",
            f"does not call what --spec names: use {SPEC} layer_dfc_x4",
        ),
        (build_uncalled, f"dfc_x4 {MOE}", f"use {SPEC} layer_dfc_x4"),
        (
            build_hybrid,
            f"dfc_x4 {HYBRID}",
            f"dfc_x4 is for GPT models: use {SPEC} hybrid_dfc_x4",
        ),
        (build_hybrid, f"layer_dfc_x4 {HYBRID}", f"use {SPEC} hybrid_dfc_x4"),
        (
            build_gpt,
            "hybrid_sfc_x2",
            f"hybrid_sfc_x2 is for hybrid models: use {SPEC} sfc_x2",
        ),
        (build_uncalled, "hybrid_sfc_x2", "hybrid_sfc_x2 is for hybrid models"),
        (build_gpt, "from_args", "does not have: .*add_connection_args"),
        (build_uncalled, "layer_from_args", "flags that this script does not have"),
        (build_hybrid, f"hybrid_from_args {HYBRID}", "flags that this script does not have"),
        (build_gpt, "dfc_4", "specs dfc_4: there is no such name; there are sfc_x4, dfc_x4"),
        (build_gpt, "dfcx4", "specs dfcx4: there is no such name"),
        (build_gpt, "from_arg", "specs from_arg: there is no such name"),
        (build_hybrid, f"hybird_dfc_x4 {HYBRID}", "specs hybird_dfc_x4: there is no such name"),
        (build_gpt, "hcx_x4", "there is no such name; there are sfc_x4, dfc_x4, shc_x4, dhc_x4, mhc_x4, mfc_x4, with"),
        (build_gpt, "mhc", "there is no such name; there are sfc_x4"),
        (build_gpt, "dhc_x0", "there is no such name"),
        (build_hybrid, f"dhc_x4 {HYBRID}", f"dhc_x4 is for GPT models: use {SPEC} hybrid_dhc_x4"),
        (build_uncalled, "dhc_x4_m2", f"use {SPEC} layer_dhc_x4_m2"),
    ],
)
def test_a_name_that_is_not_this_scripts(
    build: Any, flags: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(monkeypatch, f"{SPEC} {flags}")
    with pytest.raises((UserError, AttributeError), match=sentence):
        build(args)


def test_questions_about_other_names_are_answered() -> None:
    assert not hasattr(specs, "anything")
    assert not hasattr(specs.dfc_x4, "layer_specs")
    assert not hasattr(specs.dfc_x4, "module")
    assert specs.dfc_x4 is specs.dfc_x4
    assert specs.dfc_x4 != specs.dfc_x2
    assert {specs.dfc_x4, specs.layer_dfc_x4} == {specs.layer_dfc_x4, specs.dfc_x4}
    assert "dfc_x4" in repr(specs.dfc_x4)


@pytest.mark.parametrize("symbol", "MGD+")
@pytest.mark.parametrize("name", ["hybrid_dfc_x4", "hybrid_sfc_x2"])
def test_layers_of_transformer_engine_are_missed_when_the_model_is_built(
    symbol: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=rf"the hybrid pattern asks for .* \({re.escape(symbol)}\)"):
        # Megatron has no models with both latent and plain attention.
        build_hybrid(parse(monkeypatch, f"--hybrid-layer-pattern {symbol}-{'*-' * (symbol in 'MG')} {SPEC} {name}"))


def test_multi_token_prediction_of_a_hybrid_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_hybrid(parse(monkeypatch, f"{MOE} --hybrid-layer-pattern *-*E/*E {SPEC} hybrid_dfc_x4"))
    assert len(sites(model)) == 6
    t = tiny.tokens()
    tiny.seed_dropout(1)
    model(*tiny.inputs(t), labels=t[:, 1:]).mean().backward()
    assert all(site.dynamic_weight.grad.any() for site in sites(model.mtp))


def test_norms_reach_the_multi_token_prediction_of_a_hybrid_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a GPTModel is refused: `test_norms.py`."""
    norms = "--qk-layernorm --qk-layernorm-over-heads --norm-after"
    words = f"{MOE} --hybrid-layer-pattern *-*E/*E {norms} --frac-rate 4 {SPEC} hybrid_from_args"
    model = build_hybrid(parse(monkeypatch, words, add_connection_args))
    names = [name for name, _ in model.mtp.named_parameters()]
    assert sum(".norm_after." in name for name in names) == 2
    assert sum(isinstance(module, NormOverHeads) for module in model.mtp.modules()) == 2


def write(folder: Path, name: str, frac: ConnectionConfig | None, **stamped: Any) -> None:
    """A checkpoint of Megatron's as far as its connections show: the tensors, the arguments, the tracker."""
    state = tiny.build("dense", frac).sharded_state_dict()
    (folder / name).mkdir(parents=True)
    dist_checkpointing.save({"args": Namespace(**stamped), **state}, str(folder / name))
    (folder / "latest_checkpointed_iteration.txt").write_text(name.removeprefix("iter_"))


@pytest.mark.parametrize(
    ("stored", "stamped", "name", "sentence"),
    [
        (FracConfig(rate=4), {}, "dfc_x4", None),
        (FracConfig(rate=4), {}, "sfc_x4", "has dfc_x4 connections, this run has sfc_x4 connections: name the spec"),
        (FracConfig(rate=4), {}, "layer_sfc_x4", "has dfc_x4 connections, this run has sfc_x4"),
        (FracConfig(rate=4), {}, "hybrid_dfc_x2", "has dfc_x4 connections, this run has dfc_x2"),
        (FracConfig(rate=4, dynamic=False), {}, "dfc_x4", "has sfc_x4 connections, this run has dfc_x4"),
        (None, {}, "dfc_x4", "has plain residual connections, .* convert it by `megatron-fc upcycle`"),
        (FracConfig(rate=4), {"frac_rate": 4, "frac_tanh": False}, "dfc_x4", "was trained with .*tanh=False"),
    ],
)
def test_a_checkpoint_of_other_connections(
    stored: FracConfig | None,
    stamped: dict[str, Any],
    name: str,
    sentence: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megatron itself drops what the model does not ask for."""
    write(tmp_path, "iter_0000005", stored, **stamped)
    pattern = HYBRID if name.startswith("hybrid") else ""
    args = parse(monkeypatch, f"--load {tmp_path} {pattern} {SPEC} {name}")
    build = build_hybrid if pattern else build_uncalled if name.startswith("layer") else build_gpt
    if sentence is None:
        assert build(args)
    else:
        with pytest.raises(UserError, match=sentence):
            build(args)


@pytest.mark.parametrize("stored", [None, "dfc_x4", "dhc_x4", "mhc_x4", "mfc_x4"])
def test_a_checkpoint_of_every_other_kind(stored: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "iter_0000005", None if stored is None else FAMILY[stored])
    has = "plain residual" if stored is None else stored
    for label in ("dfc_x4", "dhc_x4", "mhc_x4", "mfc_x4"):
        args = parse(monkeypatch, f"--load {tmp_path} {SPEC} {label}")
        if label == stored:
            assert build_gpt(args)
            continue
        with pytest.raises(UserError, match=f"has {has} connections, this run has {label} connections: "):
            build_gpt(args)


@pytest.mark.parametrize("strictness", ["log_all", "ignore_all"])
def test_what_is_missing_may_start_at_the_identity_where_megatron_is_told_so(
    strictness: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, stored in (("plain", None), ("static", FracConfig(rate=4, dynamic=False))):
        write(tmp_path / name, "iter_0000005", stored)
        load = f"--load {tmp_path / name} --dist-ckpt-strictness {strictness}"
        assert build_gpt(parse(monkeypatch, f"{load} {SPEC} dfc_x4"))
    with pytest.raises(UserError, match="has sfc_x4 connections, this run has dfc_x2"):
        build_gpt(parse(monkeypatch, f"{load} {SPEC} dfc_x2"))


def test_which_checkpoint_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "old", "iter_0000005", FracConfig(rate=4))
    write(tmp_path / "old", "iter_0000007", FracConfig(rate=2))
    old, empty = tmp_path / "old", tmp_path / "empty"
    for flags in (f"--load {empty} --save {empty} --save-interval 5", f"--load {old} --ckpt-step 5", ""):
        assert build_gpt(parse(monkeypatch, f"{flags} {SPEC} dfc_x4"))
    for flags in (f"--load {old}", f"--load {empty} --pretrained-checkpoint {old}"):
        with pytest.raises(UserError, match="iter_0000007 has dfc_x2 connections"):
            build_gpt(parse(monkeypatch, f"{flags} {SPEC} dfc_x4"))
    (old / "iter_0000007" / ".metadata").unlink()  # as the format torch, which is seen when it is loaded
    assert build_gpt(parse(monkeypatch, f"--load {old} {SPEC} dfc_x4"))


def test_a_checkpoint_in_torchs_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch_dcp and fsdp_dtensor are; neither looks for what the checkpoint has beyond the model."""
    state = {"model": tiny.build("dense", FracConfig(rate=4)).state_dict(), "iteration": 5}
    save_in_torchs_format(state, checkpoint_id=tmp_path / "iter_0000005", no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert build_gpt(parse(monkeypatch, f"--load {tmp_path} {SPEC} dfc_x4"))
    with pytest.raises(UserError, match="has dfc_x4 connections, this run has sfc_x4"):
        build_gpt(parse(monkeypatch, f"--load {tmp_path} {SPEC} sfc_x4"))
