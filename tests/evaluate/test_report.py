"""The table beside the paper's numbers, and the curves over tokens."""

from pathlib import Path

import pytest

from megatron_fc import UserError
from megatron_fc.evaluate.report import Evaluated, default_decay, write_report
from megatron_fc.evaluate.results import add_results
from megatron_fc.evaluate.task_list import read_task_list

_LIST = """
tasks:
  first: {metric: acc_norm, shots: 0}
  second: {metric: acc}
averages:
  both: {first: 1, second: 3}
  half: {both: 1, first: 1}
paper:
  residual: {first: 0.5, half: 0.25}
"""


def run(folder: Path, connection: str, shift: float) -> Path:
    for iteration in (10, 20):
        facts = {"connection": connection, "iteration": iteration, "tokens": 100 * iteration}
        tasks = {
            name: {"value": value + shift * iteration, "metric": metric, "shots": 0, "limit": None, "documents": 1200}
            for name, value, metric in (("first", 0.4, "acc"), ("second", 0.2, "acc"), ("text", 0.71, "bits_per_byte"))
        }
        tasks["first"]["stderr"] = 0.0211
        tasks["second"] |= {"stderr": None, "shots": None}  # a group whose tasks differ
        path = folder / f"iter_{iteration:07d}.json"
        add_results(path, facts, "tasks", tasks)
        add_results(path, facts, "perplexity", {"c4": {"value": 3.0 - shift * iteration}})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [run(tmp_path / "plain", "residual", 0.0), run(tmp_path / "connected", "dfc_x4", 0.01)]


def test_table_and_curves(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(_LIST)
    wanted = read_task_list([str(tmp_path / "list.yaml")])
    written = write_report(runs, wanted, tmp_path / "report", 0.5)
    assert [path.name for path in written] == ["results.md", "tasks.png", "loss.png"]
    assert all(path.stat().st_size > 10_000 for path in written[1:])
    lines = [line for line in written[0].read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["", "metric", "shots", "paper: residual", "residual, 2,000 tokens", "dfc_x4, 2,000 tokens"]
    assert {row[0]: row[2] for row in rows[2:4]} == {"first": "0", "second": ""}
    values = {row[0]: row[3:] for row in rows[2:]}
    assert values["first"] == ["50.00 %", "40.00 ± 2.11 % (1,200)", "60.00 ± 2.11 % (1,200)"]
    assert values["both"] == ["", "25.00 %", "45.00 %"]  # (0.4 + 3 * 0.2) / 4
    assert values["half"] == ["25.00 %", "32.50 %", "52.50 %"]
    assert values["text"] == ["", "0.71 (1,200)", "0.91 (1,200)"]
    assert values["c4"] == ["", "3.0000", "2.8000"]


def test_curves_are_over_tokens(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[list[float], list[float]]] = []
    original = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, *a, **k: (drawn.append((list(x), list(y))), original(axes, x, y, *a, **k))[1]
    )
    units: set[str] = set()
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, unit, **k: units.add(unit))
    write_report(runs[1:], read_task_list([]), tmp_path / "report", 0.5)
    assert units == {"acc", "bits_per_byte", "nats per token"}
    # Points and moving average of first: (0.5 * 0.5 + 0.25 * 0.5 ...) with Adam's correction.
    assert drawn[0] == ([1000, 2000], pytest.approx([0.5, 0.6]))
    assert drawn[1] == ([1000, 2000], pytest.approx([0.5, (0.25 * 0.5 + 0.5 * 0.6) / 0.75]))
    # By default a curve of ten points is smoothed, and one of fewer ends at the table's number.
    assert default_decay([Evaluated("dfc_x4", [{}] * 10)]) == 0.5
    drawn.clear()
    write_report(runs[1:], read_task_list([]), tmp_path / "report", None)
    assert drawn[1] == drawn[0]


def test_refusals(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no results: give the --out of"):
        write_report([tmp_path], read_task_list([]), tmp_path / "report", 0.5)
    with pytest.raises(UserError, match="--decay 1: give a number from 0 on, below 1"):
        write_report(runs, read_task_list([]), tmp_path / "report", 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written, File exists: give another folder"):
        write_report(runs, read_task_list([]), tmp_path / "file", 0.5)
