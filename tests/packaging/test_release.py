"""`scripts/release.py`: the version is stated alike in all its places, and the notes are the changelog's section."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_fc
from megatron_fc.errors import UserError
from support.wheel import REPOSITORY

SECTIONS = (
    "# Changelog",
    "## [Unreleased]",
    "- later",
    "## [2.0.0] - 2026-12-01",
    "### Added",
    "- this",
    "## [1.0.0] - 2026-01-01",
)
CHANGELOG = "\n\n".join(SECTIONS)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("release", REPOSITORY / "scripts" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_version_is_stated_alike(release: ModuleType) -> None:
    assert "- " in release.notes(megatron_fc.__version__)


@pytest.mark.parametrize(
    ("version", "cited", "sentence"),
    [
        ("2.0.0", "2.0.0", None),
        ("2.0.0", "1.0.0", "CITATION.cff says version 1.0.0, megatron_fc 2.0.0: make them equal"),
        ("2.1.0", "2.1.0", r"CHANGELOG.md has no section `## \[2.1.0\] - YYYY-MM-DD`"),
    ],
)
def test_notes(
    version: str,
    cited: str,
    sentence: str | None,
    release: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(release, "ROOT", tmp_path)
    (tmp_path / "CITATION.cff").write_text(f"title: x\nversion: {cited}\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    if sentence is None:
        assert release.notes(version) == "### Added\n\n- this"
    else:
        with pytest.raises(UserError, match=sentence):
            release.notes(version)
