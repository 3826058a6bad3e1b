"""A suite's file: the runs that it stands for, and every mistake in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_fc.ablation.suite import Run, read_suite
from megatron_fc.cli.main import main

ROOT = Path(__file__).parents[2]
SUITE: dict[str, Any] = {
    "config": "tiny.yaml",
    "overrides": {"train_iters": 20, "lr_decay_style": None},
    "seeds": [3, 5, 8],
    "baseline": "residual",
    "variants": {
        "residual": {"connection": "residual", "copies": 2},
        "dfc_x4": {"connection": "dfc", "rate": 4},
        "dfc_x2": {"connection": "dfc", "rate": 2, "seeds": 1, "against": "dfc_x4"},
    },
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "small.yaml"
    file.write_text(
        yaml.safe_dump({key: value for key, value in (SUITE | changes).items() if value != "left out"}, sort_keys=False)
    )
    return file


def test_runs_come_seed_by_seed_and_copies_last(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path), ["lr=0.01"])
    assert suite.config == tmp_path / "tiny.yaml"
    assert [run.name for run in suite.runs] == [
        "residual-seed3",
        "dfc_x4-seed3",
        "dfc_x2-seed3",
        "residual-seed5",
        "dfc_x4-seed5",
        "residual-seed8",
        "dfc_x4-seed8",
        "residual-seed3-copy1",
        "residual-seed3-copy2",
    ]
    words = ["train_iters=20", "lr_decay_style=null", "lr=0.01", 'connection="residual"', "seed=3", "perturbation=2"]
    assert suite.settings_of(Run("residual", 3, 2)) == words
    assert [run.name for run in suite.chosen(["dfc_x4"], [3, 8])] == ["dfc_x4-seed3", "dfc_x4-seed8"]
    assert suite.variants["dfc_x2"].against == "dfc_x4"
    assert read_suite(suite.file, baseline="dfc_x4").variants["residual"].against == "dfc_x4"


VARIANTS = SUITE["variants"]


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({}, ["--variants", "dfc_x3"], "unknown variant of {file}: 'dfc_x3': did you mean 'dfc_x4'?"),
        ({}, ["--seeds", "4"], "seed 4 is none of {file}: it has 3, 5, 8"),
        (
            {},
            ["--baseline", "dfc_x2"],
            "residual has seed 5, which its baseline dfc_x2 lacks: give the baseline as many",
        ),
        ({}, ["--baseline", "plain"], "unknown baseline of residual in {file}: 'plain'"),
        ({}, ["rate=8"], "rate=8 is what dfc_x4 of {file} sets itself: drop it, or change the file"),
        ({}, ["seed=8"], "seed=8 is the suite's own to set: drop it"),
        ({}, ["--jobs", "0"], "--jobs 0: give a number from 1 on"),
        ({"variant": {}}, [], "unknown key of {file}: 'variant': did you mean 'variants'?"),
        ({"seeds": "left out"}, [], "{file} lacks seeds: a suite has config, seeds, baseline, variants"),
        ({"seeds": [3, 3]}, [], "seeds [3, 3] names one twice"),
        (
            {"seeds": ["a"]},
            [],
            "1 to 2147483647, not ['a']: write e.g. seeds: [1, 2, 3]",
        ),
        ({"variants": {"residual": {"seeds": 4}}}, [], "seeds=4 of residual must be a number from 1 to 3"),
        ({"variants": {"residual": 3}}, [], "residual must hold `name: value` lines, not 3"),
        (
            {"variants": VARIANTS | {"residual": {"connection": "residual", "seeds": 2}}},
            [],
            "{file}: dfc_x4 has seed 8, which its baseline residual lacks: give the baseline as many seeds",
        ),
        ({"seeds": [2**31]}, [], "seeds must be whole numbers from 1 to 2147483647"),
        ({"half_width": 0}, [], "half_width=0 must be a loss above 0, e.g. 0.02"),
        ({"half_width": "small"}, [], "half_width='small' must be a loss above 0"),
        ({"half_width": float("nan")}, [], "half_width=nan must be a loss above 0"),
        ({"keep_checkpoints_of": [4]}, [], "keep_checkpoints_of names seed 4, which is none of the suite"),
        ({"variants": VARIANTS | {"../up": {}}}, [], "'../up' names folders of runs: call the variant by letters"),
        ({"overrides": {"seed": 5}}, [], "seed=5 is the suite's own to set: drop it"),
        ({"variants": VARIANTS | {"far": {"run_dir": "x"}}}, [], 'run_dir="x" is the suite\'s own to set: drop it'),
        ({}, ["--variants", "dfc_x2", "--seeds", "8"], "dfc_x2 of {file} has no run of seed 8: give another seed"),
        (
            {"config": str(ROOT / "configs" / "demo.yaml"), "variants": {"typed": {"rat": 4}} | VARIANTS},
            [],
            "typed of {file}: unknown key in section model: 'rat': did you mean 'rate'?",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    changes: dict[str, Any], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, **changes)
    assert main(["ablate", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert said.format(file=file) in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


def test_a_variant_that_is_named_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    file.write_text(file.read_text() + "  dfc_x4: {connection: dfc, rate: 8}\n")
    assert main(["ablate", str(file)]) == 2
    assert f"{file}: dfc_x4 stands in the lines 14 and 22: keep one" in capsys.readouterr().err


def test_the_suites_are_what_they_are_described_as() -> None:
    suites = {file.stem: read_suite(file) for file in (ROOT / "configs" / "ablation").glob("*.yaml")}
    assert suites.keys() == {"paper", "depth", "noise", "stress", "reasons"}
    assert list(suites["paper"].variants) == [
        *("residual", "dfc_x4", "dfc_x2", "sfc_x4", "dhc_x4", "mhc_x4"),
        *("sfc_x2", "dfc_x1", "dfc_x8", "no_norm", "no_tanh", "no_scale", "dhc_x2", "mfc_x4"),
    ]
    assert min(len(variant.seeds) for variant in suites["paper"].variants.values()) >= 5
    assert min(len(variant.seeds) for variant in suites["depth"].variants.values()) >= 3
    for name in ("residual", "dhc_x4", "dfc_x2", "no_scale"):  # their records are those of the paper's suite
        assert suites["reasons"].variants[name].settings == suites["paper"].variants[name].settings
    assert {variant.copies for variant in suites["noise"].variants.values()} == {5, 0}
