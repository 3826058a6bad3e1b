"""The Python that README and docs print, run with the names that it takes for granted."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.training.arguments import parse_and_validate_args

from megatron_fc import FracConfig, FracConnection, HyperConfig
from megatron_fc.ablation.suite import read_suite
from megatron_fc.evaluate.task_list import Wanted, read_task_list
from megatron_fc.megatron.parameter_order import connection_parameters_first
from megatron_fc.profiling.files import read_report
from support import tiny
from support.documented import snippets
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed

SNIPPETS = snippets()
FLAGS = """--num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
--micro-batch-size 1 --train-iters 1 --lr 1e-3 --vocab-size 128 --tokenizer-type NullTokenizer --transformer-impl local
--distributed-backend gloo --no-gradient-accumulation-fusion --no-masked-softmax-fusion --frac-rate 4"""


def execute(name: str, number: int, **given: Any) -> dict[str, Any]:
    """Run a text's snippet; returns the names that it leaves."""
    names = dict(given)
    exec(compile(SNIPPETS[name][number], name, "exec"), names)
    return names


def gpt_model(config: Any, spec: Any, rest: object, **more: Any) -> GPTModel:
    """GPTModel with what the texts leave out."""
    assert rest is ...
    return GPTModel(config, spec, tiny.VOCABULARY, tiny.SEQUENCE, position_embedding_type="rope", **more)


def configs(model: torch.nn.Module) -> list[FracConfig]:
    return [site.config for site in model.modules() if isinstance(site, FracConnection)]


def without_te(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make specs of the local layers, whatever is asked for: Transformer Engine is never in the tests' environment."""
    return lambda *given, use_transformer_engine: make(*given, use_transformer_engine=False)


def test_every_snippet_is_run_here() -> None:
    here = {"README.md": 1, "docs/laboratory.md": 1, "docs/plug-in.md": 6, "docs/traffic.md": 2}
    elsewhere = {"docs/plan.md": 1, "docs/train.md": 1}  # test_commands.py
    assert {name: len(of_text) for name, of_text in SNIPPETS.items()} == here | elsewhere
    assert {name: len(of_text) for name, of_text in snippets("yaml").items()} == {
        "docs/evaluate.md": 1,
        "docs/science.md": 1,
        "docs/upcycle.md": 1,  # tests/checkpoints/test_upcycle.py
    }


def test_a_list_of_tasks(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(snippets("yaml")["docs/evaluate.md"][0])
    (tmp_path / "tasks").mkdir()
    listed = read_task_list([str(tmp_path / "list.yaml")])
    assert listed.tasks == {"hellaswag": Wanted("acc_norm", 0), "my_task": Wanted("acc", 5)}
    assert listed.folders == [tmp_path / "tasks"]


def test_a_suite(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(snippets("yaml")["docs/science.md"][0])
    assert [run.name for run in read_suite(tmp_path / "suite.yaml").runs][:3] == [
        "residual-seed11",
        "dfc_x4-seed11",
        "dfc_x2-seed11",
    ]


def test_a_checkpoint_of_ones_own_is_compared(tmp_path: Path) -> None:
    model = tiny.build("dense", FracConfig(rate=2))
    folder = tmp_path / "checkpoints" / "iter_0000100"
    folder.mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))
    given = {"transformer_config": model.config, "Path": lambda name: tmp_path / name}
    execute("docs/plug-in.md", 3, config=FracConfig(rate=2), **given)
    for config, has in ((FracConfig(rate=4), "this run has dfc_x4"), (None, "this run has plain residual connections")):
        with pytest.raises(SystemExit, match=has):
            execute("docs/plug-in.md", 3, config=config, **given)


def test_a_model_in_the_readme() -> None:
    config = tiny.transformer_config("dense")
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    left = execute("README.md", 0, transformer_config=config, your_layer_spec=spec, GPTModel=gpt_model)
    assert configs(left["model"]) == [FracConfig(rate=4)] * 4
    assert tiny.logits(left["model"], tiny.tokens()).shape == (2, tiny.SEQUENCE, tiny.VOCABULARY)


def test_a_model_with_multi_token_prediction() -> None:
    left = execute(
        "docs/plug-in.md",
        0,
        transformer_config=tiny.transformer_config("mtp"),
        plain_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        get_gpt_decoder_block_spec=without_te(partial(get_gpt_decoder_block_spec, normalization="RMSNorm")),
        get_gpt_mtp_block_spec=without_te(get_gpt_mtp_block_spec),
        GPTModel=gpt_model,
    )
    assert configs(left["model"]) == [FracConfig(rate=4)] * 6
    assert left["model"].mtp.layers


def test_a_model_with_a_wider_stream() -> None:
    config = tiny.transformer_config("dense")
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    models = [tiny.build("dense", HyperConfig(slots=4))]
    models[0].config.pipeline_model_parallel_size = 2
    left = execute("docs/plug-in.md", 2, transformer_config=config, layer_spec=layer, models=models)
    model = gpt_model(config, left["spec"], ...)
    assert tiny.logits(model, tiny.tokens()).shape == (2, tiny.SEQUENCE, tiny.VOCABULARY)
    [model] = left["models"]
    assert model.config.hidden_size == 4 * tiny.WIDTH
    assert tiny.logits(model, tiny.tokens()).shape == (2, tiny.SEQUENCE, tiny.VOCABULARY)


def test_a_hook_of_the_model_config() -> None:
    config = SimpleNamespace(pre_wrap_hooks=[])
    execute("docs/plug-in.md", 1, model_config=config)
    assert config.pre_wrap_hooks == [connection_parameters_first]


def test_flags_of_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *FLAGS.split()])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    # It leaves a tokenizer, writers and timers behind.
    monkeypatch.setattr("megatron.training.arguments.set_global_variables", lambda args: None)
    left = execute("docs/plug-in.md", 4, parse_and_validate_args=parse_and_validate_args)
    assert (left["args"].frac_rate, left["args"].frac_norm) == (4, "rmsnorm")


def test_a_loop_of_ones_own_is_profiled(tmp_path: Path) -> None:
    model = tiny.build("dense", FracConfig(rate=4))
    execute(
        "docs/traffic.md",
        1,
        Path=lambda name: tmp_path / name,
        models=[model],
        loader=range(5),
        train_step=lambda models, number: tiny.logits(models[0], tiny.tokens(seed=number)).sum().backward(),
    )
    assert read_report(tmp_path / "runs" / "traffic" / "mine").run.connection == "dfc_x4"


def test_a_connection_without_megatron() -> None:
    h, o = torch.randn(2, 3, 5, 2048).unbind(0)
    left = execute("docs/plug-in.md", 5, h=h, o=o)
    assert torch.equal(left["x"], h)
    torch.testing.assert_close(left["h"], h + o)


def test_a_connection_in_the_emulator(capsys: pytest.CaptureFixture[str]) -> None:
    execute("docs/laboratory.md", 0)
    assert f"# {capsys.readouterr().out.strip()}\n" in SNIPPETS["docs/laboratory.md"][0]


def test_bytes_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    execute("docs/traffic.md", 0)
    counted = float(capsys.readouterr().out)
    assert f"# {counted / 1e9:.1f}e9, " in SNIPPETS["docs/traffic.md"][0]
