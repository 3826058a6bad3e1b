#!/usr/bin/env python3
"""Run the quick tests against every megatron-core 0.19 release and the newest pre-release; write the table.

The releases are installed into .compat/<version>, without their dependencies, and put ahead of the environment's
own. Exit code 1 if a supported release fails.
"""

import os
import platform
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from packaging.version import Version

from megatron_fc.megatron.versions import NEWEST_TESTED, OLDEST

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".compat"
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = [
    "tests/megatron/test_versions.py",
    "tests/megatron/test_norm_protocol.py",
    "tests/megatron/test_plain_names.py",
    "tests/megatron/test_specs.py",
    "tests/megatron/test_hybrid.py",
    "tests/megatron/test_named_specs.py",
    "tests/megatron/test_precision.py",
    "tests/training/test_recipe.py",
    "tests/checkpoints/test_upcycle.py",
]
# Written by hand: main is no release, and a checkout of it is no part of this script.
MAIN = """Megatron-LM's main (d98e8a64dd of 2026-08-22, it calls itself 0.20.0): of `tests/megatron` and
`tests/connections` 1,030 passed and 32 failed on 2026-11-29. All of these are of multi-token prediction, which there
needs Transformer Engine for plain residuals, too.
"""
# Whole runs in processes of their own belong to `make test`.
OPTIONS = ["-m", "not slow and not gpu", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup"]


@dataclass
class Result:
    """What the tests said of one release; `error` where they could not start."""

    version: Version
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    error: str = ""

    @property
    def works(self) -> bool:
        return not self.error and not self.failed and self.passed > 0


def main() -> int:
    available = released_versions()
    supported = [version for version in available if version.release[:2] == OLDEST.release[:2] and not version.pre]
    newest = max(supported)
    coming = [version for version in available if version.is_prerelease and version > newest][:1]
    results = []
    for version in [*supported, *coming]:
        result = check(version)
        results.append(result)
        print(row(result), flush=True)
    PAGE.write_text(page(results, newest, bool(coming)))
    if newest > NEWEST_TESTED:
        print(
            f"{newest} is newer than NEWEST_TESTED in megatron_fc/megatron/versions.py: set it if the row above is good"
        )
    return 0 if all(result.works for result in results if result.version in supported) else 1


def released_versions() -> list[Version]:
    """Newest first, as pip's index says."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "megatron-core", "--pre"]
    said = subprocess.run(pip, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    line = re.search(r"Available versions: (.*)", said)
    assert line, said
    return sorted((Version(word) for word in line[1].split(", ")), reverse=True)


def check(version: Version) -> Result:
    """Install a release and run the tests with it."""
    folder = CACHE / str(version)
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, f"megatron-core=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            return Result(version, error="does not install")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    ask = "import megatron.core.package_info as p; print(p.__file__)"
    used = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False)
    if folder not in Path(used.stdout.strip()).parents:
        return Result(version, error="is hidden by another megatron-core")
    report = CACHE / f"{version}.xml"
    report.unlink(missing_ok=True)
    words = [sys.executable, "-m", "pytest", *OPTIONS, f"--junitxml={report}", *TESTS]
    log = CACHE / f"{version}.log"
    with open(log, "w") as output:
        subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        return Result(version, error=f"does not start, see {log.relative_to(ROOT)}")
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return Result(version, total - failed - skipped, failed, skipped)


def row(result: Result) -> str:
    verdict = result.error or ("works" if result.works else "fails")
    return f"| {result.version} | {result.passed} | {result.failed} | {result.skipped} | {verdict} |"


def page(results: list[Result], newest: Version, has_pre_release: bool) -> str:
    rows = "\n".join(row(result) for result in results)
    none = "" if has_pre_release else f"The index has no pre-release newer than {newest}.\n"
    files = textwrap.fill(", ".join(f"`{test}`" for test in TESTS) + ".", 120)
    return f"""# Which megatron-core works

Written by `make compat` on {date.today()}; do not edit. Python {platform.python_version()}, CPU lane, everything else
as in `constraints.txt`. Tests, without the whole runs:
{files}

| megatron-core | passed | failed | skipped | |
|---|---|---|---|---|
{rows}

{none}A release before {OLDEST} is refused when the adapter is imported, one after {NEWEST_TESTED} used with a warning.
One whose layers take a norm's residual in a way that is not known is refused when the model is built.

{MAIN}"""


if __name__ == "__main__":
    sys.exit(main())
