"""The check of megatron-core's version at import of the adapter."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import megatron.core
import pytest
from packaging.version import Version

from megatron_fc.errors import UserError
from megatron_fc.megatron import versions

IMPORT = "import megatron_fc.megatron.versions as c; print(c.megatron_version())"


def import_with(folder: Path) -> subprocess.CompletedProcess[str]:
    """Import the adapter with a folder ahead of everything that is installed."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=False)


def a_megatron(folder: Path, version: tuple[int, int, int, str]) -> Path:
    """A checkout of Megatron-LM as far as the check looks: without metadata, and not to be imported yet."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('imported too early')")
    facts = f"VERSION = {version!r}\n__shortversion__ = '.'.join(map(str, VERSION[:3]))\n"
    (core / "package_info.py").write_text(facts)
    return folder


def test_version_is_that_of_the_package_that_is_imported() -> None:
    assert versions.megatron_version() == Version(megatron.core.__version__.partition("+")[0])


def test_a_checkout_ahead_on_the_path_counts(tmp_path: Path) -> None:
    done = import_with(a_megatron(tmp_path, (0, 20, 0, "rc0")))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.20.0rc0\n"
    assert done.stderr.count("UserWarning") == 1
    assert "megatron-core 0.20.0rc0 is newer than 0.19.2, the newest that megatron_fc was tested with" in done.stderr


def test_an_older_one_is_refused(tmp_path: Path) -> None:
    done = import_with(a_megatron(tmp_path, (0, 18, 2, "")))
    assert done.returncode == 1
    assert done.stderr.endswith("UserError: megatron-core 0.18.2 is too old: pip install 'megatron-core>=0.19'\n")


def test_tested_versions_pass_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in (versions.OLDEST, versions.NEWEST_TESTED):
            monkeypatch.setattr(versions, "megatron_version", lambda version=version: version)
            versions.check_megatron_version()


def test_what_make_compat_runs_is_there() -> None:
    root = Path(__file__).parents[2]
    tests = runpy.run_path(str(root / "scripts" / "compat.py"), run_name="compat")["TESTS"]
    assert tests
    assert not [test for test in tests if not (root / test).is_file()]


def test_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="megatron-core is not installed: pip install"):
        versions.check_megatron_version()
