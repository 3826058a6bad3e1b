"""docs/evidence.md: what it names exists, and no claim of the README's table is without its row."""

import json
import re
import shlex
import subprocess

from support import fork_server
from support.documented import ROOT

EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
README = (ROOT / "README.md").read_text()
ROWS = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", EVIDENCE, re.MULTILINE)]
CLAIMS = {row[0]: row[1] for row in ROWS if row[0] != "claim"}


def named(text: str) -> list[str]:
    return re.findall("`([^`]+)`", text)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_each_claim_names_a_command_or_a_file() -> None:
    assert len(CLAIMS) > 30
    for claim, evidence in CLAIMS.items():
        assert named(evidence), claim
        for text in named(evidence):
            first, *words = shlex.split(text)
            if first == "pytest":
                assert words, claim
                assert all((ROOT / word).exists() for word in words), text
            elif first == "make":
                assert words[0] in targets(), text
                assert all((ROOT / word.removeprefix("ARGS=")).exists() for word in words[1:]), text
            elif first == "python":
                assert (ROOT / words[0]).exists(), text
            else:
                assert (ROOT / first).exists(), f"{claim}: {text} is neither a command nor a file"


def test_each_row_of_the_readmes_tables_is_here() -> None:
    part = README.partition("## What works")[2].partition("\n## ")[0]
    claims = {row.split(" | ")[0] for row in re.findall(r"^\| ([^\s|].* \| .*)\|$", part, re.MULTILINE)}
    assert len(claims) > 15
    assert not claims - CLAIMS.keys() - {"for every kind"}


def test_printed_differences_are_those_recorded() -> None:
    """Of variants to plain residuals, over seeds."""
    folder = ROOT / "benchmarks" / "results" / "ablation"
    recorded = {
        of["variant"]: (str(len(of["by_seed"])), f"{of['validation']['mean']:+.3f} ± {of['validation']['half']:.3f}")
        for suite in ("reasons", "stress", "depth", "paper")  # variants of several suites: those of the paper's
        for of in json.loads((folder / suite / "summary.json").read_text())["variants"]
        if len(of["by_seed"]) > 1
    }
    for text in (README, (ROOT / "docs" / "science.md").read_text()):
        printed = re.findall(r"^\| (\w+)[^|]* \| (\d+) \| ([+-]\d\.\d+ ± \d\.\d+) \|", text, re.MULTILINE)
        assert len(printed) > 4
        for variant, seeds, difference in printed:
            assert (seeds, difference) == recorded[variant], variant


def test_each_program_starts() -> None:
    """Their `--help`, without what they measure."""
    programs = {shlex.split(text)[1] for evidence in CLAIMS.values() for text in named(evidence) if "python " in text}
    assert programs
    for program in programs:
        done = subprocess.run(
            [fork_server.python(), program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout
