"""The stand-in for torch: what is said on names alone is what torch and Megatron say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fc.cli.main import main
from megatron_fc.preflight.torch_names import NeedsTorch, _named, with_names

CONFIGS = Path(__file__).parents[2] / "configs"
WITH = "import sys; from megatron_fc.cli.main import main; code = main(); "
WITH += "print(type(sys.modules['torch']).__name__, file=sys.stderr); sys.exit(code)"


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which says at its end what torch was there."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_FC_TORCH"}
    command = [sys.executable, "-c", WITH, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["precision=mxfp8", "--gpu", "gb300"],
        ["connection=dhc", "pipeline_model_parallel_size=4", "num_virtual_stages_per_pipeline_rank=2"],
        ["connection=residual", "qk_layernorm_over_heads=false", "mtp_num_layers=1", "tensor_model_parallel_size=2"],
    ],
    ids=" ".join,
)
def test_plans_are_the_same(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "plan",
        str(CONFIGS / "olmoe_7b.yaml"),
        "--nodes",
        "8",
        *(words if "--gpu" in words else ["--gpu", "h100"]),
    ]
    asked += ["--json", *(words if "--gpu" not in words else [])]
    assert main(asked) == 0
    found = alone(*asked)
    assert found.stderr.split()[-1] == "_Module"
    assert json.loads(found.stdout) == json.loads(capsys.readouterr().out)


def test_a_topology_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["topology", str(CONFIGS / "olmo2_1b.yaml"), "--nodes", "4", "--gpus-per-node", "8", "--json"]
    assert main(asked) == 0
    found = alone(*asked)
    assert found.stderr.split()[-1] == "_Module"
    assert json.loads(found.stdout) == json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_refusal_is_torchs_and_megatrons(capsys: pytest.CaptureFixture[str]) -> None:
    """Names start the process again, which says it once."""
    asked = ["plan", str(CONFIGS / "olmoe_7b.yaml"), "--nodes", "8", "--gpu", "h100", "adam_beta1=1.5"]
    assert main(asked) == 2
    found = alone(*asked)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == capsys.readouterr().err


def test_names_compute_nothing() -> None:
    for compute in (_named("torch.zeros"), lambda: bool(_named("torch.x")), lambda: _named("torch.x") < 1):
        with pytest.raises(NeedsTorch):
            compute()
    assert _named("torch.bfloat16").itemsize == 2
    assert _named("torch.cuda.is_available")() is False


def test_a_process_with_torch_keeps_it() -> None:
    before = list(sys.meta_path)
    assert with_names(lambda: 7, is_process=True) == with_names(lambda: 7, is_process=False) == 7
    assert sys.meta_path == before
