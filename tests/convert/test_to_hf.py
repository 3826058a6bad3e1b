"""Checkpoints of TP2, PP2 and EP2 as Hugging Face models: the same weights, logits and greedy tokens."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor, nn

import rank
from megatron_fc.cli.main import main
from megatron_fc.convert import to_hf
from megatron_fc.training.tokenizer_digest import tokenizer_digest
from support import harness, olmo, tiny
from support.decoding import generate
from support.prompts import NEW, PROMPTS

CASES = [(architecture, connection) for architecture in olmo.KINDS for connection in olmo.CONNECTIONS]
CASES.append(("olmo2", "learned"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with random parameters, written by four ranks, and the configs of their models."""
    folder = tmp_path_factory.mktemp("convert")
    for architecture in olmo.KINDS:
        olmo.write_config(folder, architecture)
    models = {
        f"{architecture}-{connection}": olmo.model(architecture, connection) for architecture, connection in CASES
    }
    models["olmo2-bf16"] = replace(olmo.model("olmo2", "dfc_x4"), bf16=True)
    settings: dict[str, Any] = {"rotary_base": 10000, "tokenizer_digest": digest(folder / "tokenizer")}
    settings["tokenizer_model"] = str(folder / "tokenizer")
    harness.run("save_random", olmo.TP2_PP2_EP2.world, folder / "ranks", olmo.TP2_PP2_EP2, models, folder, settings)
    return folder


def digest(folder: Path) -> str | None:
    """Of the tokenizer there, as training keeps it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    seen = SimpleNamespace(vocab_size=len(tokenizer), tokenize=tokenizer.encode, inv_vocab=tokens)
    return tokenizer_digest(Namespace(tokenizer_type="HuggingFaceTokenizer"), seen)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command makes a world of itself."""
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))


def export(folder: Path, architecture: str, connection: str, target: Path, *more: str) -> int:
    words = ["convert", "to-hf", str(folder / f"{architecture}-{connection}"), str(folder / f"{architecture}.yaml")]
    return main([*words, *olmo.WORDS[connection], "--to", str(target), *more])


def shown(target: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of the model card makes, which a user of transformers alone copies."""
    monkeypatch.chdir(target)
    lines = (target / "README.md").read_text().splitlines()
    made: dict[str, Any] = {}
    exec("\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ")), made)
    return made


def load(target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    model.generation_config.eos_token_id = None  # the engine knows none
    return model.eval()


def megatron(folder: Path, architecture: str, connection: str) -> nn.Module:
    """The model of one rank with the checkpoint's weights; call it in a world."""
    made = olmo.model(architecture, connection)
    model: Any = tiny.build(made.kind, made.connection, norms=made.norms, **made.options())
    checkpoint = folder / f"{architecture}-{connection}" / "iter_0000001"
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))["model"])
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "connection"), CASES)
@pytest.mark.usefixtures("one_process")
def test_exported_model_is_megatrons(
    folder: Path, architecture: str, connection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(folder, architecture, connection, tmp_path / "out") == 0
    model = load(tmp_path / "out")
    card = shown(tmp_path / "out", monkeypatch)
    assert type(card["model"]).__name__ == type(model).__name__
    assert card["tokenizer"]("a")["input_ids"]
    stock = {"olmoe": "OlmoeForCausalLM", "olmo2": "Olmo2ForCausalLM"}[architecture]
    assert type(model).__name__ == (stock if connection == "plain" else f"Connected{stock}")
    with rank.one_rank():
        ours = megatron(folder, architecture, connection)
        assert_same_weights(ours, model, connection)
        batch = tiny.tokens(seed=4)
        with torch.no_grad():
            expected, found = tiny.logits(ours, batch), model(batch[:, :-1]).logits
        # Observed are 3e-6 of logits up to 3.5.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        tokens, _ = generate(ours)
    for cached in (True, False):
        for prompt, new in zip(PROMPTS, tokens, strict=True):
            ids = torch.tensor([prompt])
            row = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=cached
            )
            assert row[0, len(prompt) :].tolist() == new, cached
    for name, parameter in model.named_parameters():
        # All streams of Hyper-Connections are equal before the first layer and are summed behind the last one.
        if ".layers.1.attn_connection." in name and parameter.numel() > 1:
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(before.flatten().roll(1).view_as(before))
                assert (model(batch[:, :-1]).logits - expected).abs().max() > 1e-4, f"{name} has no order that shows"
                parameter.copy_(before)


def assert_same_weights(ours: nn.Module, theirs: nn.Module, connection: str) -> None:
    """Every parameter by its names in both modules, and none that has no counterpart."""
    found, seen = dict(theirs.named_parameters()), 0
    for name, parameter in ours.named_parameters():
        pairs = list(counterparts(name, parameter.detach(), found, connection != "plain"))
        assert sum(value.numel() for _, value in pairs) == parameter.numel(), name
        for where, value in pairs:
            assert torch.equal(where, value), name
        seen += parameter.numel()
    assert seen == sum(parameter.numel() for parameter in theirs.parameters())


def counterparts(
    name: str, ours: Tensor, theirs: dict[str, Tensor], connected: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of the Hugging Face model, each with what of Megatron's parameter it must be."""
    if not name.startswith("decoder.layers."):
        for old, new in {
            "embedding.word_embeddings": "model.embed_tokens",
            "output_layer": "lm_head",
            "decoder.final_layernorm.connection": "model.norm.leave",
            "decoder.final_layernorm": "model.norm.norm" if connected else "model.norm",
        }.items():
            name = name.replace(old, new)
        yield theirs[name], ours
        return
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    layer = f"model.layers.{number}"
    if rest == "self_attention.linear_qkv.weight":  # two groups of two queries, a key and a value each
        rows = ours.view(2, 4, 16, -1)
        for projection, part in (("q", rows[:, :2]), ("k", rows[:, 2]), ("v", rows[:, 3])):
            yield theirs[f"{layer}.self_attn.{projection}_proj.weight"], part.reshape(-1, ours.shape[1])
    elif ".local_experts." in rest:
        expert = int(rest.split(".")[3])
        which = "gate_up_proj" if "linear_fc1" in rest else "down_proj"
        yield theirs[f"{layer}.mlp.experts.{which}"][expert], ours
    elif rest == "mlp.linear_fc1.weight":
        yield theirs[f"{layer}.mlp.gate_proj.weight"], ours[:128]
        yield theirs[f"{layer}.mlp.up_proj.weight"], ours[128:]
    else:
        for old, new in {
            "self_attention.linear_proj": "self_attn.o_proj",
            "self_attention.q_layernorm": "self_attn.q_norm",
            "self_attention.k_layernorm": "self_attn.k_norm",
            "mlp.linear_fc2": "mlp.down_proj",
            "mlp.router": "mlp.gate",
            "self_attn_bda.norm_after": "post_attention_layernorm",
            "mlp_bda.norm_after": "post_feedforward_layernorm",
            "input_layernorm.connection": "attn_connection",
            "pre_mlp_layernorm.connection": "mlp_connection",
            "input_layernorm.norm": "input_layernorm",
            "pre_mlp_layernorm.norm": "post_attention_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
        }.items():
            if rest.startswith(old):
                rest = new + rest.removeprefix(old)
                break
        yield theirs[f"{layer}.{rest}"], ours


ALONE = """
import sys

for name in ("megatron", "megatron_fc", "apex", "transformer_engine"):
    sys.modules[name] = None  # nothing of theirs can be imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert len(tokenizer) <= model.config.vocab_size
ids = tokenizer("5 17 93 4 66", return_tensors="pt")
assert ids.input_ids.tolist() == [[5, 17, 93, 4, 66]]
assert model.generation_config.eos_token_id == tokenizer.eos_token_id
batch = tokenizer(["5 17 93 4", "66 3"], return_tensors="pt", padding=True, padding_side="left")
tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
alone = model.generate(**tokenizer("66 3", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert tokens[1, 2:].tolist() == alone[0].tolist(), "padding changes tokens"

loss = model(**ids, labels=ids.input_ids).loss
loss.backward()
expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
assert all(value.abs().max() > 0 for name, value in expected.items() if "connection" in name), "a site is not trained"
model.zero_grad()
model.train()
model.gradient_checkpointing_enable()
checkpointed = model(**ids, labels=ids.input_ids).loss
checkpointed.backward()
assert torch.equal(checkpointed, loss)
for name, parameter in model.named_parameters():
    assert name not in expected or torch.equal(parameter.grad, expected[name]), name

model.save_pretrained(again)
model.eval()
with torch.no_grad():
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert torch.equal(reloaded(**ids).logits, model(**ids).logits)
    logits = model(**ids).logits
    outputs = model(**ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    kept = {parameter.dtype for name, parameter in half.named_parameters() if "connection" in name or "leave" in name}
    assert kept == {torch.float32}
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert (half(**ids).logits.float() - logits).abs().max() < 0.1
fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
for name, parameter in fresh.named_parameters():
    assert torch.isfinite(parameter).all(), name
print("alone")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "connection"),
    [("olmoe", "dhc_x4"), pytest.param("olmo2", "learned", marks=pytest.mark.soak)],
)
@pytest.mark.usefixtures("one_process")
def test_the_folder_needs_torch_and_transformers_alone(
    folder: Path, architecture: str, connection: str, tmp_path: Path
) -> None:
    assert export(folder, architecture, connection, tmp_path / "out") == 0
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(tmp_path / "again")]
    done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("alone\n"), done.stderr[-3000:]


@pytest.mark.usefixtures("one_process")
def test_half_precision_stays_and_connections_are_fp32(folder: Path, tmp_path: Path) -> None:
    assert export(folder, "olmo2", "bf16", tmp_path / "out", "bf16=true") == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    dtypes = {name: torch.float32 if "connection" in name else torch.bfloat16 for name in tensors}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dtypes
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.usefixtures("one_process")
def test_the_names_of_transformer_engines_norms_are_known(folder: Path, tmp_path: Path) -> None:
    local, te = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"
    shutil.copytree(folder / "olmoe-plain", tmp_path / "olmoe-plain")
    shutil.copy(folder / "olmoe.yaml", tmp_path)
    index = tmp_path / "olmoe-plain" / "iter_0000001" / ".metadata"
    content = pickle.loads(index.read_bytes())
    content.state_dict_metadata[te] = content.state_dict_metadata.pop(local)
    places = content.storage_data.items()
    content.storage_data = {replace(place, fqn=te) if place.fqn == local else place: info for place, info in places}
    index.write_bytes(pickle.dumps(content))
    assert export(folder, "olmoe", "plain", tmp_path / "local") == 0
    assert export(tmp_path, "olmoe", "plain", tmp_path / "te") == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("local", "te"))
    assert first == second


@pytest.mark.usefixtures("one_process")
def test_files_hold_the_same_in_parts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, "olmo2", "plain", tmp_path / "one") == 0
    assert export(folder, "olmo2", "plain", tmp_path / "many", "--shard-gb", "0.0001") == 0
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3
    parts = {name: load_file(tmp_path / "many" / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files[:-1]:
        assert (tmp_path / "many" / file).stat().st_size < 100_000 + 4096
    assert f"in {len(files)} files: written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "connection", "more", "sentence"),
    [
        ("olmoe", "dfc_x4", ["norm_after=true"], "norm_after=True is not that of OLMoE, which has False"),
        ("olmo2", "dfc_x4", ["norm_after=false"], "norm_after=False is not that of OLMo2, which has True"),
        (
            "olmoe",
            "dfc_x4",
            ["qk_layernorm_over_heads=false"],
            "megatron-fc: qk_layernorm_over_heads=False is not that of OLMoE, which has True: only OLMoE and OLMo2 "
            "have Hugging Face classes here",
        ),
        ("olmo2", "dfc_x4", ["add_qkv_bias=true"], "add_qkv_bias=True is not that of OLMo2"),
        (
            "olmoe",
            "dfc_x4",
            ["moe_shared_expert_intermediate_size=32"],
            "moe_shared_expert_intermediate_size=32 is",
        ),
        ("olmoe", "dfc_x4", ["family=hybrid"], "family=hybrid has no Hugging Face class"),
        ("olmo2", "dfc_x4", ["kv_channels=8"], "kv_channels=8: OLMo2 has heads that are together as wide as the model"),
        ("olmo2", "dfc_x4", ["connection=dhc"], "this run has dhc_x4 connections: add connection=dfc"),
        (
            "olmo2",
            "plain",
            ["rotary_base=100"],
            "iter_0000001, 100 here, which makes another model: give what it was written with",
        ),
        (
            "olmo2",
            "dfc_x4",
            ["num_attention_heads=8"],
            "decoder.layers.self_attention.linear_qkv.weight is [2, 128, 64] in",
        ),
        ("olmo2", "dfc_x4", ["ffn_hidden_size=64"], "decoder.layers.mlp.linear_fc1.weight is [2, 256, 64] in"),
        ("olmoe", "plain", ["num_experts=2"], "decoder.layers.mlp.router.weight is [2, 4, 64] in"),
        (
            "olmoe",
            "plain",
            ["moe_ffn_hidden_size=32"],
            "linear_fc1.weight is [2, 4, 128, 64] in",
        ),
        ("olmoe", "dfc_x4", ["moe_ffn_hidden_size=32"], "[2, 4, 64, 64] in this model: give the config of the run"),
        ("olmo2", "dfc_x4", ["num_layers=1"], "has 2 layers, and num_layers=1: give the config of the run"),
        ("olmo2", "dfc_x4", ["num_layers=3"], "has 2 layers, and num_layers=3: give the config of the run"),
        (
            "olmo2",
            "dfc_x4",
            ["untie_embeddings_and_output_weights=false"],
            "has output_layer.weight, unknown to this model: give the config of the run",
        ),
        (
            "olmoe",
            "plain",
            ["moe_router_load_balancing_type=sinkhorn", "moe_aux_loss_coeff=0"],
            "moe_router_load_balancing_type=sinkhorn chooses other experts than OLMoE",
        ),
        ("olmoe", "plain", ["moe_router_force_load_balancing=true"], "moe_router_force_load_balancing=True is not"),
        ("olmo2", "plain", ["--shard-gb", "nan"], "--shard-gb nan is no size of a file"),
        ("olmo2", "plain", ["--shard-gb", "0"], "--shard-gb 0 is no size of a file"),
        (
            "olmo2",
            "dfc_x4",
            ["tokenizer_type=NullTokenizer"],
            "tokenizer_type=NullTokenizer cannot go with",
        ),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    architecture: str,
    connection: str,
    more: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(folder, architecture, connection, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_process")
def test_what_is_there_stays(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert export(folder, "olmo2", "plain", tmp_path / "out") == 2
    assert "exists and is never overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert export(folder, "olmo2", "plain", tmp_path / "out" / "mine" / "below") == 2
    assert "below cannot be written, Not a directory: give another folder" in capsys.readouterr().err


@pytest.mark.usefixtures("one_process")
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path / "larger")
    more = f"tokenizer_model={tmp_path / 'larger'}"
    assert export(folder, "olmo2", "plain", tmp_path / "out", more) == 2
    assert f"the embedding has 128 rows and the tokenizer {tmp_path / 'larger'} 129 tokens" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["larger"]


@pytest.mark.usefixtures("one_process")
def test_a_tokenizer_with_other_tokens_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers of 40 and 41, which the digest's text does not have, are exchanged."""
    shutil.copytree(folder / "tokenizer", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["40"], words["41"] = words["41"], words["40"]
    file.write_text(json.dumps(content))
    assert export(folder, "olmo2", "plain", tmp_path / "out", f"tokenizer_model={tmp_path / 'other'}") == 2
    assert "makes other tokens of a text than the one that" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.usefixtures("one_process")
def test_two_exports_into_one_folder_do_not_mix(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins and ends while the first one writes."""
    target, write = tmp_path / "out", to_hf._write_code
    codes = []

    def meanwhile(*words: Any) -> None:
        monkeypatch.setattr(to_hf, "_write_code", write)
        codes.append(export(folder, "olmo2", "dfc_x4", target))
        write(*words)

    monkeypatch.setattr(to_hf, "_write_code", meanwhile)
    assert export(folder, "olmo2", "plain", target) == 2
    assert codes == [0]
    assert "exists and is never overwritten" in capsys.readouterr().err
    assert json.loads((target / "config.json").read_text())["architectures"] == ["ConnectedOlmo2ForCausalLM"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
