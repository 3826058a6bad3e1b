#!/usr/bin/env python3
"""A release: builds wheel and sdist, checks them in a new environment, prints the release notes. `make release`.

What it builds lies in dist/ of the repository. It uploads nothing and tags nothing. `--demo` takes overrides for the
demo, which is whole without them: `make release ARGS="--demo train_iters=20 lr_decay_iters=20"`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import megatron_fc  # noqa: E402
from megatron_fc.errors import UserError  # noqa: E402
from support.wheel import build_wheel, install  # noqa: E402


def notes(version: str) -> str:
    """Return the section of CHANGELOG.md, after CITATION.cff and the section's date were checked.

    Raises:
        UserError: one of the places that state the version says another one.
    """
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if cited is None or cited[1] != version:
        raise UserError(f"CITATION.cff says version {cited and cited[1]}, megatron_fc {version}: make them equal")
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(f"[{version}]")] or [""]
    heading, _, text = section.partition("\n")
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading):
        raise UserError(f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD`: write it, with today's date")
    return text.strip()


def step(name: str, *words: str | Path, cwd: Path = ROOT) -> None:
    """Run a command that has to end with 0."""
    print(f"== {name}", flush=True)
    subprocess.run(list(map(str, words)), cwd=cwd, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", nargs="*", default=[], metavar="key=value", help="overrides of the demo")
    args = parser.parse_args()
    version = megatron_fc.__version__
    try:
        text = notes(version)
    except UserError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    python = sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        print(f"== build of {version}", flush=True)
        built = build_wheel(Path(scratch))
        dist = ROOT / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        shutil.copytree(built.parent, dist)
        step("twine", python, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
        step("tests of the wheel", python, "-m", "pytest", "-q", "tests/packaging")
        print("== demo from the wheel", flush=True)
        installed = install(built, Path(scratch) / "environment", extra="train")
        done = installed.run("megatron-fc", "demo", *args.demo, cwd=Path(scratch))
        print(done.stdout + done.stderr, end="")
        if done.returncode:
            return 1
    print(f"== release notes of {version}\n\n{text}\n")
    for file in sorted(dist.iterdir()):
        print(file.relative_to(ROOT), f"{file.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
