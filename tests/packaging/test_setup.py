"""`scripts/setup` with the real pip, on a project of one dependency: what is repeated, and what goes on."""

import errno
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest

from support.patience import wait_until
from support.wheel import REPOSITORY

# Builds the project without setuptools; waits where the test has put a pipe.
BACKEND = """
import os, signal, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    if os.path.exists("pipe"):
        open("pipe").read()
        signal.pause()
    name = "project-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("project-1.dist-info/METADATA", open("METADATA").read())
        wheel.writestr("project-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("project-1.dist-info/RECORD", "")
    return name

def build_wheel(*arguments, **names):
    raise NotImplementedError
"""
PROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
METADATA = "Metadata-Version: 2.1\nName: project\nVersion: 1\n"
METADATA += "Provides-Extra: dev\nRequires-Dist: tool==1; extra == 'dev'\n"


INSTALLING = (
    "Installing megatron_fc and its tools into .venv: once, about two minutes and 5 GB (PyTorch with CUDA).\n"
    "Interrupted, the same command goes on. Log: .venv/install.log\n"
)
UPDATING = "Bringing .venv up to date with pyproject.toml and constraints.txt ...\n"


def write_wheel(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}_module.py", "")
        wheel.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        wheel.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.dist-info/RECORD", "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts")
    texts = {"backend.py": BACKEND, "pyproject.toml": PROJECT, "METADATA": METADATA, "constraints.txt": "tool==1\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    write_wheel(tmp_path / "index", "setuptools")
    return folder


def start(project: Path) -> subprocess.Popen[str]:
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project.parent / "index")}
    return subprocess.Popen(
        [project / "scripts" / "setup"],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def setup(project: Path) -> tuple[int, str, str]:
    process = start(project)
    out, err = process.communicate()
    return process.returncode, out, err


def reader_of(pipe: Path) -> int | None:
    """Open a pipe that somebody reads, None before."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def start_and_kill(project: Path) -> str:
    """Kill it and its pip while the project is built, when all packages are here; returns what it printed."""
    os.mkfifo(project / "pipe")
    process = start(project)
    os.close(wait_until(lambda: reader_of(project / "pipe"), lambda: str(process.poll())))
    os.killpg(process.pid, signal.SIGKILL)
    (project / "pipe").unlink()
    return process.communicate()[0]


def python_of(project: Path) -> int:
    """Another one in an environment that was made anew."""
    return (project / ".venv" / "bin" / "python").lstat().st_ino


@pytest.mark.slow
def test_nothing_is_done_twice_and_what_broke_off_goes_on(project: Path) -> None:
    log, wheels = project / ".venv" / "install.log", project / ".cache" / "wheels"

    code, out, err = setup(project)
    assert (code, out) == (2, INSTALLING + "  0 of 1 packages are here\n")
    assert "depends on tool==1" in err, "which is not in the index yet"

    # What has been downloaded before it was killed is there for the next call, and the index no more.
    python = python_of(project)
    write_wheel(project.parent / "index", "tool")
    assert start_and_kill(project) == INSTALLING + "  1 of 1 packages are here\n"
    for wheel in (project.parent / "index").iterdir():
        wheel.rename(project.parent / wheel.name)
    assert setup(project) == (0, INSTALLING + "  1 of 1 packages are here\n", "")
    assert python_of(project) == python
    assert list(project.glob(".venv/lib/python3*/site-packages/tool_module.py"))
    assert not wheels.exists()

    # New dates are no new content.
    log.write_text("of the last installation")
    (project / "pyproject.toml").touch()
    assert setup(project) == (0, "", "")
    assert (project / ".venv" / ".installed").stat().st_mtime >= (project / "pyproject.toml").stat().st_mtime
    assert log.read_text() == "of the last installation"

    # An update that was killed is not forgotten when the content is the old one again.
    (project / "constraints.txt").write_text("tool==1\n# more\n")
    assert start_and_kill(project) == UPDATING
    (project / "constraints.txt").write_text("tool==1\n")
    assert setup(project) == (0, UPDATING, "")
    assert python_of(project) == python

    # Where pip had begun to write, all is made anew.
    (project / "constraints.txt").write_text("tool==1\n# more\n")
    assert start_and_kill(project) == UPDATING
    log.write_text("Installing collected packages: tool, project\n")
    for wheel in project.parent.glob("*.whl"):
        wheel.rename(project.parent / "index" / wheel.name)
    assert setup(project) == (0, INSTALLING + "  1 of 1 packages are here\n", "")
    assert python_of(project) != python
    assert setup(project) == (0, "", "")
