"""Pruning: what does nothing is dropped without a change of the logits; the whole command; every refusal."""

import re
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.cli.main import main
from megatron_fc.compress.importance import Importance
from megatron_fc.compress.prune import _Kept, _refuse_layout
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.megatron.stored_connections import stored_structure
from support import fork_server, tiny
from support import training_runs as runs
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed

DFC = FracConfig(rate=4)
FAMILY = pytest.mark.parametrize(
    "connection",
    [DFC, HyperConfig(slots=4), ManifoldConfig(slots=4, leave="learned")],
    ids=lambda connection: connection.label,
)
CHANNELS = 16

config = runs.config
finished = runs.finished


def arguments(**options: int | bool) -> Namespace:
    """What pruning reads of Megatron's arguments, for the tiny models."""
    values = {"num_layers": 2, "num_attention_heads": 4, "num_experts": 4, "ffn_hidden_size": 128}
    values |= {"moe_ffn_hidden_size": 64, "kv_channels": CHANNELS, "group_query_attention": False}
    return Namespace(**(values | {"num_query_groups": 4} | options))


def scored(model: torch.nn.Module) -> Importance:
    with torch.no_grad(), Importance(model) as importance:
        for seed in range(4):
            tiny.logits(model, tiny.tokens(seed))
    return importance


def cut(model: torch.nn.Module, kind: str, args: Namespace, importance: Importance, **sizes: int) -> torch.nn.Module:
    """The model with the given sizes, those parts of it that have the highest scores."""
    kept = _Kept(importance, args, Namespace(**(vars(args) | sizes)))
    if "num_experts" in sizes:
        sizes["num_moe_experts"] = sizes.pop("num_experts")
    if args.group_query_attention:
        sizes["num_query_groups"] = args.num_query_groups
    connection = model.decoder.layers[0].input_layernorm.connection.config
    small = tiny.build(kind, connection, seed=2, kv_channels=CHANNELS, **sizes)
    old = model.state_dict()
    wanted = [name for name, tensor in small.state_dict().items() if isinstance(tensor, torch.Tensor)]
    small.load_state_dict({name: kept.cut(old, name) for name in wanted})
    return small


def pruned(model: torch.nn.Module, kind: str, **sizes: int) -> torch.nn.Module:
    return cut(model, kind, arguments(), scored(model), **sizes)


def silence_heads(model: torch.nn.Module, heads: list[int], groups: int) -> None:
    """Heads whose projection is zero and whose output is small."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            proj = layer.self_attention.linear_proj.weight.view(tiny.WIDTH, 4, CHANNELS)
            proj[:, heads] = 0
            if groups == 4:  # own values
                qkv = layer.self_attention.linear_qkv.weight.view(4, 3, CHANNELS, tiny.WIDTH)
                qkv[heads, 2] *= 1e-3


def silence_neurons(linear_fc1: torch.nn.Module, neurons: list[int]) -> None:
    """Neurons whose value is zero, whatever the gate says."""
    with torch.no_grad():
        linear_fc1.weight.view(2, -1, tiny.WIDTH)[1, neurons] = 0


def assert_same_logits(small: torch.nn.Module, model: torch.nn.Module) -> None:
    expected = tiny.logits(model, tiny.tokens(7))
    torch.testing.assert_close(tiny.logits(small, tiny.tokens(7)), expected, rtol=1e-5, atol=1e-6)


def test_idle_heads_with_their_own_keys() -> None:
    model = tiny.build("moe", DFC)
    tiny.randomise_connections(model)
    silence_heads(model, [0, 2], groups=4)
    assert_same_logits(pruned(model, "moe", num_attention_heads=2), model)


def test_heads_of_query_groups() -> None:
    """Two groups of two queries: of each the weaker query goes, its key and value stay."""
    args = arguments(group_query_attention=True, num_query_groups=2)
    model = tiny.build("moe", DFC, num_query_groups=2)
    tiny.randomise_connections(model)
    silence_heads(model, [1, 2], groups=2)
    importance = scored(model)
    for heads in importance.heads.values():
        heads[[1, 2]] = 0  # the heads of a group share their values, so these are not small by themselves
    small = cut(model, "moe", args, importance, num_attention_heads=2)
    assert_same_logits(small, model)


def test_idle_neurons_of_experts_and_of_a_dense_layer() -> None:
    model = tiny.build("mixed", DFC)
    tiny.randomise_connections(model)
    silence_neurons(model.decoder.layers[0].mlp.linear_fc1, list(range(0, 128, 2)))
    for number, expert in enumerate(model.decoder.layers[1].mlp.experts.local_experts):
        silence_neurons(expert.linear_fc1, list(range(number, number + 32)))
    small = pruned(model, "mixed", ffn_hidden_size=64, moe_ffn_hidden_size=32)
    assert_same_logits(small, model)


@FAMILY
def test_idle_layer(connection: ConnectionConfig) -> None:
    """A layer whose sub-layers return zero, with connections at the identity, passes the stream on."""
    model = tiny.build("moe", connection)
    tiny.randomise_connections(model)
    first = model.decoder.layers[0]
    for site in (first.input_layernorm.connection, first.pre_mlp_layernorm.connection):
        site.start_as_residual()
    with torch.no_grad():
        first.self_attention.linear_proj.weight.zero_()
        for expert in first.mlp.experts.local_experts:
            expert.linear_fc2.weight.zero_()
    small = pruned(model, "moe", num_layers=1)
    assert_same_logits(small, model)


def test_experts_that_tokens_prefer_stay_with_their_rows_of_the_router() -> None:
    model = tiny.build("moe", DFC)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.router.weight[[0, 3]] *= 1e-3
    importance = scored(model)
    small = cut(model, "moe", arguments(), importance, num_experts=2)
    for index, (layer, old) in enumerate(zip(small.decoder.layers, model.decoder.layers, strict=True)):
        assert importance.experts[index].sum().item() == pytest.approx(4 * 2 * tiny.SEQUENCE, rel=1e-5)
        kept = importance.experts[index].topk(2).indices.sort().values.tolist()
        assert torch.equal(layer.mlp.router.weight, old.mlp.router.weight[kept])
        for new, number in zip(layer.mlp.experts.local_experts, kept, strict=True):
            expert = old.mlp.experts.local_experts[number]
            assert torch.equal(new.linear_fc1.weight, expert.linear_fc1.weight)
            assert torch.equal(new.linear_fc2.weight, expert.linear_fc2.weight)


@FAMILY
def test_connections_are_kept_with_their_layers(connection: ConnectionConfig) -> None:
    model = tiny.build("moe", connection)
    tiny.randomise_connections(model)
    small = pruned(model, "moe", num_attention_heads=2, num_experts=2, moe_ffn_hidden_size=16)
    old = model.state_dict()
    connections = [name for name in small.state_dict() if is_connection_key(name)]
    assert len(connections) == sum(is_connection_key(name) for name in old) > 2 * 2
    for name in connections:
        assert torch.equal(small.state_dict()[name], old[name])


def test_what_transformer_engine_keeps_in_a_projection_stays() -> None:
    """The norm before it, and the state of FP8."""
    model = tiny.build("mixed", DFC)
    kept = _Kept(scored(model), arguments(), arguments(ffn_hidden_size=64, moe_ffn_hidden_size=32))
    for name in (
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_bias",
        "decoder.layers.0.mlp.linear_fc1._extra_state",
        "decoder.layers.0.mlp.linear_fc2._extra_state",
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1._extra_state",
    ):
        tensor = torch.randn(tiny.WIDTH)
        assert kept.cut({name: tensor}, name) is tensor


def run(*words: object) -> str:
    command = [fork_server.python(), "-m", "megatron_fc", *map(str, words)]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_pruned_checkpoint_trains(config: Path, finished: Path) -> None:
    target = config.parent / "small"
    sizes = ["num_layers=1", "num_attention_heads=1", "num_experts=3", "moe_ffn_hidden_size=16"]
    printed = run("prune", finished / "checkpoints", config, "--export", *sizes, "--to", target)
    assert "original" in printed
    settings = f"load={target} finetune=true {' '.join(sizes)} kv_channels=16"
    assert settings in printed
    assert stored_structure(latest_checkpoint(target)) == stored_structure(latest_checkpoint(finished / "checkpoints"))
    run_dir = config.parent / "small_run"
    summary = runs.train(config, run_dir, *settings.split(), "train_iters=10", "lr_warmup_iters=0")
    assert summary["last_loss"] < summary["first_loss"]


@pytest.mark.slow
def test_both_losses_are_of_the_same_batches(config: Path, finished: Path) -> None:
    """A model that loses nothing, on data that go on where the last pass over them ended."""
    target = config.parent / "as_large"
    words = ["prune", finished / "checkpoints", config, "dataloader_type=cyclic", "--export", "num_layers=2"]
    printed = run(*words, "--to", target, "--calibration-iters", "2")
    original, pruned = re.findall(r"│ +(\d+\.\d{4}) │", printed)
    assert original == pruned
    kept = [
        dist_checkpointing.load_common_state_dict(str(latest_checkpoint(folder)))["args"].consumed_valid_samples
        for folder in (finished / "checkpoints", target)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2: pruning reads the whole model"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2"),
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size=2"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size=2"),
        ({"mtp_num_layers": 1}, "without multi-token prediction"),
        ({"multi_latent_attention": True}, "num_attention_heads of multi-latent attention"),
        ({"qk_layernorm_over_heads": True}, "num_attention_heads share one norm with qk_layernorm_over_heads"),
        ({"moe_layer_freq": [0, 1]}, "prune depth where all layers are alike"),
    ],
)
def test_models_that_are_refused(options: dict[str, Any], said: str) -> None:
    sizes = {"num_attention_heads": 2, "num_layers": 1}
    values = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    values |= {"expert_tensor_parallel_size": 1, "mtp_num_layers": None, "multi_latent_attention": False}
    values |= {"num_experts": 4, "moe_grouped_gemm": False, "moe_layer_freq": 1, "qk_layernorm_over_heads": False}
    recipe = Namespace(family="gpt")
    _refuse_layout(Namespace(**values), recipe, sizes)
    with pytest.raises(UserError, match=said):
        _refuse_layout(Namespace(**(values | options)), recipe, sizes)


@pytest.mark.parametrize(
    ("export", "overrides", "said"),
    [
        ("hidden_size=16", [], "would cut through the slots"),
        ("num_head=1", [], "num_attention_heads"),
        ("num_experts=no", [], "give a positive number"),
        ("num_experts=8", [], "the model has 4"),
        ("num_experts=1", [], "a token goes to 2 experts"),
        ("num_experts=2", ["family=hybrid"], "family=gpt"),
        ("num_attention_heads=1", ["group_query_attention=true", "num_query_groups=2"], "multiple of num_query_groups"),
        ("ffn_hidden_size=16", [], "all layers of this model have experts, which are moe_ffn_hidden_size=32 wide"),
        ("num_experts=2", ["ckpt_step=10"], "iter_0000010"),
        ("num_experts=2", ["eval_iters=0"], "need at least one validation iteration, set eval_iters=8"),
        ("num_experts=2", ["moe_grouped_gemm=true"], "moe_grouped_gemm keeps all experts in one layer"),
    ],
)
def test_refusals(
    export: str, overrides: list[str], said: str, config: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", finished / "checkpoints", config, *overrides, "--export", export, "--to", config.parent / "never"]
    assert main([str(word) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not (config.parent / "never").exists()
