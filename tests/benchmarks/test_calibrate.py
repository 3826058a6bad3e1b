"""The calibration's data and record; `python benchmarks/calibrate.py` makes it anew, with a package from PyPI."""

import json
import sys

import pytest

import calibrate
from calibrate import RECIPES, Compared, Published, published, summary
from record import RESULTS


def test_published_times_are_those_of_recipes() -> None:
    cases = published()
    assert sum(case.use == "calibration" for case in cases) == 45
    assert {case.kernel for case in cases} == set(RECIPES)
    assert all(case.use in ("calibration", "added") or case.use.startswith("left out: ") for case in cases)
    assert len({(case.kernel, case.source, case.width) for case in cases}) == len(cases)


def test_every_case_is_recorded_and_none_is_left_out_in_silence() -> None:
    stored = json.loads((RESULTS / "calibration-h100.json").read_text())
    page = (RESULTS / "calibration-h100.md").read_text()
    found = [Compared(**row) for row in stored["rows"]]
    assert [case.us for case in found] == [case.us for case in published() if not case.use.startswith("left out")]
    assert page.count("\n| ") == len(published()) + 2 * 3  # headings
    assert stored["summary"] == summary([case for case in found if case.use == "calibration"])
    assert stored["summary"] in page


@pytest.mark.skipif(not calibrate.PACKAGE.exists(), reason="python benchmarks/calibrate.py installs liger-kernel")
@pytest.mark.parametrize("kernel", ["softmax forward", "add + RMSNorm backward"])
def test_a_case_is_replayed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest of the calibration, to the recorded time."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    calibrate.install()
    case = next(case for case in published() if case.kernel == kernel and case.use == "calibration")
    rows = json.loads((RESULTS / "calibration-h100.json").read_text())["rows"]
    stored = next(row for row in rows if (row["kernel"], row["width"]) == (kernel, case.width))
    assert calibrate.compare(case).predicted_us == pytest.approx(stored["predicted_us"], rel=0.02)


def test_the_summary_counts_what_is_within_a_tenth() -> None:
    cases = [Compared("k", "s", 1, 1, "bf16", 10.0, "calibration", us) for us in (8.0, 9.1, 10.9, 14.0)]
    assert summary(cases) == "4 cases, mean 1.05, 2 within 10%, 0.80 to 1.40"
    assert cases[-1].ratio == pytest.approx(1.4)
    assert isinstance(cases[0], Published)
