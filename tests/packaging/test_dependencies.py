"""What pyproject.toml asks for, held to what the sources import."""

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_fc.extras import DATA, TRAIN, remedy

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_fc"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Torch brings Triton, except on machines that cannot use it.
WITH_TORCH = {"triton"}
# Megatron's training imports them: the one to write checkpoints, the other to load tokenizers.
FOR_MEGATRON = {"psutil", "transformers"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


EXTRAS = {extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}


@cache
def installed() -> Mapping[str, list[str]]:
    """Distributions by the modules that they bring."""
    return packages_distributions()


def imported_packages(*sources: Path) -> set[str]:
    """Names of the distributions that Python files import, those inside functions too."""
    modules = set()
    for file in [file for source in sources for file in ([source] if source.is_file() else source.rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add((node.module or "").partition(".")[0])
    others = modules - set(sys.stdlib_module_names) - {"megatron_fc"}
    return {canonicalize_name(installed().get(name, [name])[0]) for name in others}


def test_the_base_is_what_the_plugin_and_the_operators_import() -> None:
    used = imported_packages(
        PACKAGE / "__init__.py", PACKAGE / "errors.py", PACKAGE / "connections", PACKAGE / "megatron"
    )
    assert names(PROJECT["dependencies"]) == used - WITH_TORCH


def test_train_is_what_the_rest_imports() -> None:
    optional = {"modelopt": "modelopt", "mpi4py": "mpi", "lm-eval": "eval", "datasets": "eval"}
    used = imported_packages(PACKAGE) - names(PROJECT["dependencies"]) - WITH_TORCH - set(optional)
    assert EXTRAS["train"] == (used | FOR_MEGATRON) - EXTRAS["data"]
    assert EXTRAS["data"] <= used
    assert (set(TRAIN.values()), set(DATA.values())) == (EXTRAS["train"], EXTRAS["data"])
    assert all(extra in EXTRAS for extra in optional.values())
    assert "megatron_fc[train,data,eval,mpi,muon,docs]" in PROJECT["optional-dependencies"]["dev"]


def test_every_extra_that_a_text_names_exists() -> None:
    folders = [REPOSITORY / name for name in ("megatron_fc", "launch", "docs", "docker", "scripts", "tests")]
    files = [REPOSITORY / "README.md", *(file for folder in folders for file in folder.rglob("*"))]
    texts = [
        file.read_text() for file in files if file.suffix in (".py", ".md", ".sh", ".txt") or "Dockerfile" in file.name
    ]
    named = {
        extra
        for text in texts
        for found in re.findall(r"(?:megatron_fc|['\"]\.)\[([a-z,]+)\]", text)
        for extra in found.split(",")
    }
    assert {"train", "te", "modelopt", "mpi", "muon"} <= named
    assert named <= set(EXTRAS)


def test_a_module_of_ours_that_is_missing_is_no_package() -> None:
    assert remedy(ModuleNotFoundError(name="yaml")) == (
        "pyyaml, which is not installed: pip install 'megatron_fc[train]'"
    )
    assert remedy(ModuleNotFoundError(name="torch")) == "torch, which is not installed: pip install megatron_fc"
    assert remedy(ModuleNotFoundError(name="megatron_fc.nothing")) is None
    assert remedy(ModuleNotFoundError(name="transformers.models.nothing")) is None
