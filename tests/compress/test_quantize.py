"""`megatron-fc quantize`, and training that goes on from its checkpoints, with the real ModelOpt."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.errors import UserError
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.training.recipe import load_recipe
from support.compress_commands import run
from support.compress_runs import config, tensors, trained  # noqa: F401  (fixtures)

pytestmark = pytest.mark.modelopt

RECIPES = {"fp8": 40, "int8": 40, "int4_awq": 20}  # quantizers: 20 linear layers, of int4_awq the weights alone

# In Megatron's wrapper for half precision, into which a model is restored before it is wrapped.
MODEL = {"fp8": [], "int8": ["bf16=true"], "int4_awq": []}


@pytest.fixture(scope="module", params=RECIPES)
def quantized(request: pytest.FixtureRequest, config: Path, trained: Path) -> tuple[str, Path, str]:  # noqa: F811
    """A recipe, its checkpoints, and what the command printed."""
    recipe = request.param
    target = config.parent / recipe
    words = ["quantize", trained, config, *MODEL[recipe], "--recipe", recipe, "--to", target]
    done = run(config.parent, *words, "--calibration-iters", "4")
    assert done.code == 0, done.printed
    return recipe, target, done.printed


def test_table_has_both_losses(quantized: tuple[str, Path, str]) -> None:
    recipe, target, printed = quantized
    original = float(re.search(r"original │ +(\d\.\d{4})", printed)[1])
    loss = float(re.search(rf"{recipe} +│ +(\d\.\d{{4}})", printed)[1])
    assert 4.5 < original < 5.8
    assert loss == pytest.approx(original, abs=0.02)
    assert f"{RECIPES[recipe]} quantizers: written to {target}" in printed
    assert "calibration" in printed


def test_only_linear_layers_have_scales(quantized: tuple[str, Path, str]) -> None:
    _, target, _ = quantized
    scaled = [key for key in tensors(latest_checkpoint(target)) if "quantizer" in key]
    assert scaled
    assert all(re.search(r"\.linear_(qkv|proj|fc1|fc2)\.(weight|input)_quantizer\.", key) for key in scaled)


def test_saved_and_restored_to_the_bit(quantized: tuple[str, Path, str], config: Path) -> None:  # noqa: F811
    from megatron.core import dist_checkpointing

    recipe, source, _ = quantized
    run_dir = config.parent / f"{recipe}_again"
    still = [*MODEL[recipe], "lr=0.0", "min_lr=0.0", "weight_decay=0.0", "train_iters=1", "save_interval=1"]
    done = run(config.parent, "train", config, f"load={source}", "finetune=true", f"run_dir={run_dir}", *still)
    assert done.code == 0, done.printed
    before, after = latest_checkpoint(source), latest_checkpoint(run_dir / "checkpoints")
    expected, found = tensors(before), tensors(after)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    states = [dist_checkpointing.load_common_state_dict(str(path / "modelopt_state")) for path in (before, after)]
    assert states[0] == states[1]


def test_quantization_aware_training_learns_and_resumes(config: Path, quantized: tuple[str, Path, str]) -> None:  # noqa: F811
    recipe, source, _ = quantized
    run_dir = config.parent / f"{recipe}_trained"
    options = [*MODEL[recipe], f"run_dir={run_dir}", "lr_warmup_iters=0", "save_interval=10"]
    done = run(config.parent, "train", config, f"load={source}", "finetune=true", "train_iters=10", *options)
    assert done.code == 0, done.printed
    done = run(config.parent, "train", config, "train_iters=20", *options)
    assert done.code == 0, done.printed
    losses = read_metrics(run_dir).loss
    assert list(losses) == list(range(1, 21))
    assert losses[20] < losses[1] - 0.1
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint.name == "iter_0000020"
    assert any("quantizer" in key for key in tensors(checkpoint))


@pytest.mark.parametrize("quantized", ["fp8"], indirect=True)
def test_quantised_student_learns_from_a_teacher(config: Path, trained: Path, quantized: tuple[str, Path, str]) -> None:  # noqa: F811
    _, source, _ = quantized
    run_dir = config.parent / "quantised_student"
    options = [f"load={source}", "finetune=true", f"run_dir={run_dir}", "train_iters=2", "save_interval=2"]
    done = run(config.parent, "distill", config, *options, "--teacher", trained)
    assert done.code == 0, done.printed
    log = (run_dir / "logs" / "rank0.log").read_text()
    first = float(re.search(r"\| distillation loss: (\S+) \|", log)[1])
    assert 0 < first < 1e-2  # what quantisation has changed
    # What comes of it is a quantised checkpoint like the one before.
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert tensors(checkpoint).keys() == tensors(latest_checkpoint(source)).keys()
    done = run(config.parent, "train", config, f"run_dir={run_dir}", "train_iters=3", "save_interval=3")
    assert done.code == 0, done.printed


@pytest.mark.parametrize("quantized", ["fp8"], indirect=True)
def test_runs_in_fp8_are_refused(
    config: Path,  # noqa: F811
    trained: Path,  # noqa: F811
    quantized: tuple[str, Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the recipe of a machine with Transformer Engine, which this one would refuse before."""
    from megatron_fc.compress.quantize import quantize
    from megatron_fc.training.loop import train

    _, source, _ = quantized
    monkeypatch.setattr("megatron_fc.training.loop.rehearse", lambda *_: None)
    options = ["precision=fp8_tensorwise", f"load={source}", "finetune=true", f"run_dir={config.parent / 'never'}"]
    recipe = load_recipe(config, options, elsewhere=True)
    for action in (lambda: quantize(recipe, trained, config.parent / "never", "fp8", 1), lambda: train(recipe)):
        with pytest.raises(UserError, match="add precision=bf16 fp8_param_gather=false"):
            action()
    assert not (config.parent / "never").exists()


def test_experts_and_tensors_split_at_once_are_refused() -> None:
    from megatron_fc.training.precision import refuse_unquantizable

    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "fp8": None, "fp4": None}
    refuse_unquantizable(Namespace(**layout, moe_grouped_gemm=True, transformer_impl="transformer_engine"))
    for options in ({"moe_grouped_gemm": False}, {"moe_grouped_gemm": True, "transformer_impl": "local"}):
        with pytest.raises(UserError, match="tensor_model_parallel_size=2 with expert_model_parallel_size=2"):
            refuse_unquantizable(Namespace(**layout, **({"transformer_impl": "transformer_engine"} | options)))


@pytest.mark.parametrize("quantized", ["fp8"], indirect=True)
def test_refusals(config: Path, trained: Path, quantized: tuple[str, Path, str]) -> None:  # noqa: F811
    _, source, _ = quantized

    def refusal(*words: object) -> str:
        done = run(config.parent, *words)
        assert done.code == 2, done.printed
        return done.printed

    to = ["--to", config.parent / "never"]
    assert "compute capability 8.9" in refusal("quantize", trained, config, "--recipe", "nvfp4", *to)
    assert "is quantised" in refusal("quantize", source, config, "--recipe", "fp8", *to)
    assert "never overwritten" in refusal("quantize", trained, config, "--recipe", "fp8", "--to", source)
    assert "at least one" in refusal("quantize", trained, config, "--recipe", "fp8", *to, "--calibration-iters", "0")
    assert "iter_0000010" in refusal("quantize", trained, config, "ckpt_step=10", "--recipe", "fp8", *to)
    assert "plain residual" in refusal("quantize", trained, config, "connection=residual", "--recipe", "fp8", *to)
    assert "holds no optimizer state" in refusal("train", config, f"load={source}", f"run_dir={config.parent / 'r'}")
    assert "is quantised" in refusal("upcycle", "--to-residual", "--from", source, *to)
    assert "is quantised" in refusal("prune", source, config, "--export", "num_experts=2", *to)
    assert not (config.parent / "never").exists()
