"""OLMoE and OLMo2 of transformers with random weights: imported, the same logits; exported again, the same bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

import rank
from megatron_fc.cli.main import main
from megatron_fc.runs.metrics import read_metrics
from support import harness, olmo, tiny
from support.olmo import save_model
from support.training_runs import config as config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from_hf")
    for architecture in olmo.KINDS:
        olmo.write_config(folder, architecture)
        save_model(architecture, folder / architecture)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")


def convert(folder: Path, architecture: str, target: Path, *more: str, source: Path | None = None) -> int:
    words = ["convert", "from-hf", str(source or folder / architecture), str(folder / f"{architecture}.yaml")]
    return main([*words, "--to", str(target), *more])


@pytest.mark.parametrize("architecture", olmo.KINDS)
def test_imported_model_is_transformers(architecture: str, folder: Path, tmp_path: Path) -> None:
    """The config asks for DFCx4: what is imported is plain."""
    from transformers import AutoModelForCausalLM

    assert convert(folder, architecture, tmp_path / "megatron") == 0
    batch = tiny.tokens(seed=6)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder / architecture).eval()(batch[:, :-1]).logits
    made = olmo.model(architecture, "plain")
    with rank.one_rank():
        ours: Any = tiny.build(made.kind, None, norms=made.norms, **made.options())
        stored = tmp_path / "megatron" / "release"
        state = {"model": ours.sharded_state_dict()}
        ours.load_state_dict(dist_checkpointing.load(state, str(stored), strict="raise_all")["model"])
        with torch.no_grad():
            found = tiny.logits(ours.eval(), batch)
    # Observed are 2e-6 of logits up to 4.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    words = [
        "convert",
        "to-hf",
        str(tmp_path / "megatron"),
        str(folder / f"{architecture}.yaml"),
        "connection=residual",
    ]
    assert main([*words, "--to", str(tmp_path / "again")]) == 0
    before, after = (load_file(place / "model.safetensors") for place in (folder / architecture, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    theirs, again = (
        json.loads((place / "config.json").read_text()) for place in (folder / architecture, tmp_path / "again")
    )
    for name in (
        "architectures",
        "model_type",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "intermediate_size",
    ):
        assert again[name] == theirs[name], name


@pytest.mark.parametrize(
    ("architecture", "model", "more", "sentence"),
    [
        ("olmo2", {}, ["num_layers=4"], "num_hidden_layers is 2 in the model and 4 in the config"),
        ("olmo2", {}, ["vocab_size=256"], "vocab_size is 128 in the model and 256 in the config"),
        (
            "olmo2",
            {},
            ["rotary_base=500000"],
            "rope_parameters is {'rope_theta': 10000.0, 'rope_type': 'default'} in the",
        ),
        ("olmo2", {}, ["norm_after=false"], "norm_after=False is not that of OLMo2"),
        ("olmoe", {"clip_qkv": 8.0}, [], "clip_qkv=8.0 of the model is not in Megatron"),
        ("olmoe", {"norm_topk_prob": True}, [], "norm_topk_prob is True in the model and False in the config"),
    ],
)
def test_another_model_than_the_config_is_refused(
    architecture: str,
    model: dict[str, Any],
    more: list[str],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = folder / architecture
    if model:
        source = tmp_path / "model"
        save_model(architecture, source, **model)
    assert convert(folder, architecture, tmp_path / "out", *more, source=source) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert sentence in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"),
            "lacks model.layers.1.self_attn.q_norm.",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}),
            "has model.layers.2.mlp.",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(130, tiny.WIDTH)}),
            f"model.layers.1.mlp.up_proj.weight is [130, {tiny.WIDTH}] in",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(126, tiny.WIDTH)}),
            f"model.layers.1.mlp.up_proj.weight is [126, {tiny.WIDTH}] in",
        ),
        (
            lambda tensors: tensors.update(
                {"model.norm.weight": torch.ones(tiny.WIDTH).to(torch.float8_e4m3fn)},
            ),
            "is stored as F8_E4M3, whose scale is unknown",
        ),
    ],
    ids=["missing", "unexpected", "larger", "smaller", "float8"],
)
def test_tensors_that_do_not_fit_are_named(
    change: Any, sentence: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "olmo2", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert convert(folder, "olmo2", tmp_path / "out", source=tmp_path / "model") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_model_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, model_type in (("llama", "llama"), ("connected", "connected_olmoe")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
        save_file({"a": torch.ones(1)}, tmp_path / name / "model.safetensors")
    for source, sentence in (
        ("empty", "holds no config.json: give a folder that save_pretrained wrote"),
        ("llama", "model_type=llama of "),
        ("connected", "connected has connections, and from-hf reads plain models alone"),
        ("nowhere/to/be", "is no folder, and no name on the hub, which is OWNER/MODEL"),
    ):
        assert convert(folder, "olmo2", tmp_path / "out", source=tmp_path / source) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, damaged in (
        ("config.json", b'{"model_type":'),
        ("config.json", b'{"model_type": "olmo2", "hidden_size": "wide"}'),
        ("model.safetensors", (folder / "olmo2" / "model.safetensors").read_bytes()[:-8]),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b'{"weight_map": {"lm_head.bias": "model.safetensors"}}'),
    ):
        shutil.copytree(folder / "olmo2", tmp_path / "model", dirs_exist_ok=True)
        (tmp_path / "model" / name).write_bytes(damaged)
        assert convert(folder, "olmo2", tmp_path / "out", source=tmp_path / "model") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(tmp_path / "model") in error, name
        assert "Traceback" not in error
        shutil.rmtree(tmp_path / "model")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_imported_weights_are_trained_and_upcycled(config: Path, tmp_path: Path) -> None:
    """In two pipeline stages the first loss is the plain model's, with Hyper-Connections too."""
    model = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_model("olmoe", tmp_path / "hf", intermediate_size=32, max_position_embeddings=32, **model)
    norms = "qk_layernorm_over_heads=true"
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(config), norms, "--to", str(tmp_path / "new")]) == 0
    words = [
        "train",
        str(config),
        norms,
        f"load={tmp_path / 'new'}",
        "train_iters=1",
        "eval_iters=1",
        "save_interval=1",
    ]
    words += ["lr_decay_iters=40", "pipeline_model_parallel_size=2"]
    losses = []
    for name, more in (("plain", ["connection=residual"]), ("dhc", ["connection=dhc", "from_residual=true"])):
        run = tmp_path / name
        assert harness.run("command_line", 2, tmp_path / f"{name}-ranks", [*words, *more, f"run_dir={run}"]) == [0, 0]
        losses.append(read_metrics(run).loss[1])
    assert losses[0] == losses[1]
