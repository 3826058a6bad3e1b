"""What keeps an image's packages as its base has them, and what fails the build otherwise."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(script: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "docker" / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_base_wins_and_the_rest_is_pinned(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("# written by hand\nTorch==0.1\nno.such_package==3.2\n")
    lines = run("constrain.py", pins).stdout.splitlines()
    assert f"torch=={version('torch')}" in lines
    assert "no.such_package==3.2" in lines
    assert not [line for line in lines if re.match("(?i)torch==0.1|#", line)]


def test_pip_fails_rather_than_replace_the_base(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(run("constrain.py").stdout)
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-c", str(constraints)]
    assert subprocess.run([*pip, "numpy"], capture_output=True, check=False).returncode == 0
    refused = subprocess.run([*pip, "numpy>9"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "conflict" in refused.stderr


def test_the_gpu_image_has_the_extras_whose_versions_are_pinned() -> None:
    texts = [(REPOSITORY / path).read_text() for path in ("docker/Dockerfile", "scripts/lock.py")]
    extras = [set(re.findall(r"\.\[([\w,]+,\w+)\]", text)[0].split(",")) for text in texts]
    assert extras[0] == extras[1] == {"train", "data", "eval", "modelopt", "mpi"}


def test_pins_of_the_extras_do_not_repeat_the_others() -> None:
    def names(path: str) -> set[str]:
        return {
            line.partition("==")[0].lower() for line in (REPOSITORY / path).read_text().splitlines() if "==" in line
        }

    pinned = {"nvidia-modelopt", "mpi4py", "datatrove", "pyarrow", "orjson", "lm_eval", "datasets"}
    assert pinned <= names("docker/extras.txt") | names("constraints.txt")
    assert not names("docker/extras.txt") & names("constraints.txt")


@pytest.mark.parametrize(
    ("constraints", "names", "sentence"),
    [
        ("numpy==0.1\n", ["json"], f"check: numpy is {version('numpy')}, not 0.1 as constrained"),
        ("", ["no_such_module?"], "check: no_such_module is not in this image"),
        ("", ["no_such_module"], "No module named 'no_such_module'"),
    ],
)
def test_a_wrong_image_does_not_pass(tmp_path: Path, constraints: str, names: list[str], sentence: str) -> None:
    (tmp_path / "constraints.txt").write_text(constraints)
    checked = run("check.py", tmp_path / "constraints.txt", *names)
    assert checked.returncode != 0
    assert sentence in checked.stderr


def test_a_right_image_passes(tmp_path: Path) -> None:
    # A pin without a local part is met by a build that has one, as PyTorch's CPU build does.
    public = version("torch").partition("+")[0]
    (tmp_path / "constraints.txt").write_text(f"torch=={public}\nno-such-package==1\n")
    checked = run("check.py", tmp_path / "constraints.txt", "json", "numpy?")
    assert (checked.returncode, checked.stdout) == (0, "check: all there: json numpy?\n")


def test_images_build_from_what_the_context_has() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for dockerfile in ("Dockerfile", "Dockerfile.cpu"):
        text = (REPOSITORY / "docker" / dockerfile).read_text()
        for line in re.findall(r"^COPY (?:--\S+ )?(.*) \S+$", text, re.MULTILINE):
            for source in line.split():
                assert (REPOSITORY / source).exists(), f"{dockerfile} copies {source}"
                assert source not in ignored


def test_the_gpu_image_gets_what_links_of_the_package_point_to() -> None:
    """pip leaves a file out, without a word, whose link points to nothing."""
    copied = re.findall(r"^COPY (\S+) \1$", (REPOSITORY / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    links = [path for path in (REPOSITORY / "megatron_fc").rglob("*") if path.is_symlink()]
    assert links
    assert all(link.resolve().relative_to(REPOSITORY).parts[0] in copied for link in links)
