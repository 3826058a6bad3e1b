"""The wheel of this tree, installed where nothing can be imported but it and the packages that it asks for."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
# What the build reads: configs/ for the link demo/demo.yaml.
_SOURCES = ("megatron_fc", "configs", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel.

    Attributes:
        folder: of the environment.
        packages: names of the distributions that it sees beside the wheel.
    """

    folder: Path
    packages: frozenset[str]

    def run(self, program: str, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, with nothing in its way of what tests set in this process."""
        others = ("PYTHON", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "NVTE_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        command = [str(self.folder / "bin" / program), *words]
        return subprocess.run(
            command, cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
        )


def build_wheel(folder: Path) -> Path:
    """Build an sdist of the working tree and of that a wheel, both in `folder`/dist; return the wheel."""
    tree = folder / "tree"
    tree.mkdir()
    for name in _SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (folder / "dist").glob("*.whl")
    assert list((folder / "dist").glob("*.tar.gz"))
    return wheel


def install(wheel: Path, folder: Path, extra: str = "") -> Installed:
    """Install a wheel into a new environment, where it sees the packages of `extra` as they are installed here."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    [packages] = (folder / "lib").glob("python*/site-packages")
    [own] = distributions(path=[str(packages)])
    needed = _closure(own, extra)
    for package in needed:
        for top in {file.parts[0] for file in distribution(package).files or ()} - {"..", "__pycache__"}:
            link = packages / top
            if not link.is_symlink():  # a folder that several distributions share, such as nvidia/
                link.symlink_to(Path(str(distribution(package).locate_file(top))))
    return Installed(folder, frozenset(needed))


def _closure(own: Distribution, extra: str) -> set[str]:
    found: set[str] = set()

    def visit(requirements: Iterable[str] | None, extras: set[str]) -> None:
        for text in requirements or ():
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
                continue
            name = canonicalize_name(requirement.name)
            if name not in found:
                found.add(name)
                visit(distribution(name).requires, requirement.extras)

    visit(own.requires, {extra})
    return found
