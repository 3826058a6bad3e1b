"""Predictions against the recorded ones: a kernel that lost 10 points is noticed, without a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import launched
import predict
from compiled import KERNELS, Shape, shapes
from megatron_fc.errors import UserError
from predict import VARIATIONS, Prediction, compare, read
from record import RESULTS

RECORDED = RESULTS / "predicted-h200.json"
ONE = Prediction("width forward", 2048, 4, 4, 8192, mid=70.0, low=60.0, limit="issue")


def test_the_record_holds_all_kernels_and_shapes() -> None:
    assert [(p.shape, p.tokens) for p in read(RECORDED)] == predict.recorded()


def test_shapes_are_chosen_by_fractions_or_slots() -> None:
    of = "depth forward"
    assert shapes([of], [64], [2], None) == [Shape(of, 64, 2, 2)]
    assert shapes([of], [64], None, [4]) == [Shape(of, 64, 1, 4)]
    assert shapes([of], [64], [2], [4]) == [Shape(of, 64, 2, 4)]
    assert {shape[2:] for shape in shapes([of], [64], None, None)} == {(2, 2), (4, 4), (8, 8)}


@pytest.mark.parametrize("name", ["boundary forward", "width backward"])
def test_no_kernel_lost_ten_points(name: str) -> None:
    """Predict again and record where that is meant: python benchmarks/predict.py."""
    _, lost = compare(read(RECORDED), [predict.predict(Shape(name, 2048, 4, 4), 8192)])
    assert not lost


def test_a_drop_of_ten_points_is_named_in_either_case() -> None:
    table, lost = compare([ONE], [replace(ONE, mid=60.1, low=50.0)])
    assert lost == ["width forward, d = 2048, m = 4, n = 4, 8,192 tokens: the low case fell from 60 % to 50 %"]
    assert "| 70 | 60 | 60 | 50 |" in table
    assert not compare([ONE], [replace(ONE, mid=99.0, low=50.1)])[1]


def test_sensitivity_varies_each_assumption() -> None:
    """Depth waits for DRAM alone: only what that costs may move it."""
    (shares,) = predict.sensitivity([Shape("depth backward", 2048, 4, 4)], 4096).values()
    assert list(shares) == list(VARIATIONS)
    assert shares["HMMA 12 cycles"] == shares["HMMA 16 cycles"] == shares["as assumed"]
    assert abs(shares["all, HMMA 16"] - shares["as assumed"]) < predict.NOTICED


def test_nothing_in_common_is_no_comparison() -> None:
    with pytest.raises(UserError, match="nothing can be compared"):
        compare([ONE], [replace(ONE, width=4096)])


def test_tokens_are_whole_tiles() -> None:
    with pytest.raises(UserError, match=r"--tokens 6 are no whole tiles: a tile of n = 4 has 4"):
        predict.predict(Shape("depth backward", 2048, 4, 4), 6)


def test_predictions_under_other_assumptions_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "predicted.json"
    file.write_text(json.dumps({"assumptions": "000000000000", "rows": []}))
    with pytest.raises(UserError, match="predict the old kernels again"):
        read(file)
    with pytest.raises(UserError, match="is no recorded prediction"):
        read(tmp_path / "absent.json")


def test_a_kernel_nobody_said_anything_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "another", KERNELS["depth forward"])
    with pytest.raises(UserError, match="'another' is not in ROWS"):
        launched.launched(Shape("another", 2048, 4, 4))
    monkeypatch.setattr(launched, "TOKEN_VALUES", frozenset())
    with pytest.raises(UserError, match=r"pointer 'pre\.(beta|alpha)' of kernel 'depth forward'"):
        launched.launched.__wrapped__(Shape("depth forward", 2048, 4, 4))
