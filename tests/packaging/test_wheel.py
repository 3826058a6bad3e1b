"""The wheel in an environment that has megatron-core, torch and what these two ask for, and nothing else."""

import re
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import megatron_fc
from support.wheel import Installed, build_wheel, install

pytestmark = pytest.mark.slow

# A model whose layers are connected, without Megatron's training loop; then by the name that --spec takes.
SPEC = """
import sys
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fc import FracConfig, FracConnection
from megatron_fc.megatron.specs import connect


def labels(model):
    return [module.config.label for module in model.modules() if isinstance(module, FracConnection)]


torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
config = TransformerConfig(
    num_layers=2, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True, transformer_impl="local",
    gradient_accumulation_fusion=False,
)
print(labels(GPTModel(config, connect(get_gpt_layer_local_spec(), FracConfig(rate=2)), 64, 8)))
assert not [name for name in sys.modules if name.startswith("megatron.training")]

from megatron.training.models.gpt import GPTModelConfig

named = import_module(("megatron_fc.megatron.specs", "dfc_x4"))
model = GPTModelConfig(transformer=config, transformer_layer_spec=named, vocab_size=64, seq_length=8)
print(labels(model.get_builder_cls()(model).build_model(ProcessGroupCollection.use_mpu_process_groups())))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("base") / "environment")


def test_nothing_else_can_be_imported(base: Installed, tmp_path: Path) -> None:
    assert {"torch", "megatron-core", "numpy", "packaging"} <= base.packages
    seen = base.packages | {"megatron-fc"}
    others = [
        module for module, owners in packages_distributions().items() if seen.isdisjoint(map(canonicalize_name, owners))
    ]
    assert {"rich", "yaml", "transformers", "psutil", "matplotlib", "tokenizers", "pytest"} <= set(others)
    code = f"from importlib.util import find_spec; print([name for name in {others} if find_spec(name)])"
    assert base.run("python", "-c", code, cwd=tmp_path).stdout == "[]\n"


def test_import_is_cheap_and_takes_the_wheel(base: Installed, tmp_path: Path) -> None:
    code = "import sys, megatron_fc as m; print(m.__version__, 'torch' in sys.modules, m.__file__)"
    version, torch, file = base.run("python", "-c", code, cwd=tmp_path).stdout.split()
    assert (version, torch) == (megatron_fc.__version__, "False")
    assert base.folder in Path(file).parents


def test_help_lists_the_commands(base: Installed, tmp_path: Path) -> None:
    done = base.run("megatron-fc", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"train", "demo", "doctor", "traffic"} <= set(re.findall(r"^    (\w+) ", done.stdout, re.MULTILINE))


def test_doctor_prints_a_table_and_ends_with_0(base: Installed, tmp_path: Path) -> None:
    done = base.run("megatron-fc", "doctor", cwd=tmp_path, COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    rows = done.stdout.splitlines()
    assert re.fullmatch(r"Component +Here +Enables +Without it", rows[0])
    [at] = [number for number, row in enumerate(rows) if row.startswith("megatron_fc[train]")]
    assert "missing" in rows[at]
    assert "megatron-fc train and all other commands" in rows[at]
    assert "no huggingface-hub, matplotlib, psutil, rich, safetensors," in rows[at + 1]
    assert "no lm-eval, datasets: pip install 'megatron_fc[eval]'" in done.stdout
    assert "To correct" not in done.stdout


def test_doctor_runs_where_torch_does_not(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", symlinks=True)
    bare = Installed(tmp_path / "environment", frozenset())
    (tmp_path / "sick" / "torch").mkdir(parents=True)
    (tmp_path / "sick" / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: not found')")
    words = ["-m", "megatron_fc", "doctor"]
    without = bare.run("python", *words, cwd=tmp_path, PYTHONPATH=str(wheel), COLUMNS="200")
    sick = bare.run("python", *words, cwd=tmp_path, PYTHONPATH=f"{wheel}:{tmp_path}/sick", COLUMNS="200")
    assert (without.returncode, without.stderr, sick.returncode, sick.stderr) == (1, "", 1, "")
    assert "To correct: torch missing: required: pip install torch\n" in without.stdout
    assert "To correct: torch broken: ImportError: libcudart.so.13: not found\n" in sick.stdout
    assert "To correct: megatron-core missing: required: pip install megatron-core\n" in sick.stdout


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["train", "config.yaml"], "rich"),
        (["demo"], "tokenizers"),
        (["runs"], "rich"),
    ],
)
def test_commands_name_what_they_lack(words: list[str], package: str, base: Installed, tmp_path: Path) -> None:
    done = base.run("megatron-fc", *words, cwd=tmp_path)
    said = f"megatron-fc: {words[0]} needs {package}, which is not installed: pip install 'megatron_fc[train]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert list(tmp_path.iterdir()) == []


def test_specs_build_models(base: Installed, tmp_path: Path) -> None:
    done = base.run("python", "-W", "ignore", "-c", SPEC, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\[.*\]$", done.stdout, re.MULTILINE) == [str(["dfc_x2"] * 4), str(["dfc_x4"] * 4)]
