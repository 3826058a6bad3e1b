"""`megatron-fc traffic compare` as a user calls it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_fc.cli.main import main
from megatron_fc.profiling.files import write_report
from megatron_fc.profiling.records import Part, Run, report_of
from support.example_report import RUN, part, parts


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Of a residual run, and of one with Frac-Connections that moves twice the bytes."""
    write_report(tmp_path / "a", report_of(parts("residual")))
    write_report(tmp_path / "b", report_of(parts("dfc_x4", weight=2)))
    return [tmp_path / "a", tmp_path / "b"]


def test_table_and_bars(
    folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    png = folders[0] / "new" / "bars.png"
    assert main(["traffic", "compare", *map(str, folders), "--plot", str(png)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    report = report_of(parts("residual"))
    kb = f"{report.device_bytes_per_token / 1e3:.1f} kB"
    mb = f"{report.device_bytes_per_token * RUN.tokens_per_step / 1e6:.1f} MB"
    assert [cell.strip() for cell in rows["device memory"].split("│")[2:4]] == [mb, kb]
    assert "2.00x" in rows["device memory"]
    assert "2.00x" in rows["residual stream"]
    assert "1.00x" in rows["network, between nodes"]
    assert "1.00x" in rows["step time, while counting"]
    bars = [line.count("█") for line in printed.splitlines() if "█" in line]
    assert bars == [20, 40, 20, 40, 40, 40]
    assert Image.open(png).size[0] > 800


def test_reports_of_one_connection_go_by_their_folders(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_report(folders[0], report_of(parts("dfc_x4")))
    assert main(["traffic", "compare", *map(str, folders)]) == 0
    printed = capsys.readouterr().out
    assert f"dfc_x4 ({folders[0]})" in printed.replace("\n", "")
    assert f"dfc_x4 ({folders[1]})" in printed.replace("\n", "")


def _other_width(run: Run) -> Run:
    return replace(run, model={**run.model, "hidden_size": 128})


def _more_experts(run: Run) -> Run:
    return replace(run, model={**run.model, "num_experts": 8})


def _other_device(run: Run) -> Run:
    return replace(run, device="NVIDIA H100")


def _other_layout(run: Run) -> Run:
    return replace(run, layout={**run.layout, "tp": 1, "dp": 4})


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (_other_width, "hidden_size (64, 128)"),
        (_more_experts, "num_experts (None, 8)"),
        (_other_device, "device (cpu, NVIDIA H100)"),
        (_other_layout, "tp (2, 1); dp (2, 4)"),
    ],
)
def test_other_configs_are_refused(
    change: Callable[[Run], Run], fields: str, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changed: list[Part] = [replace(each, run=change(each.run)) for each in parts()]
    write_report(folders[1], report_of(changed))
    assert main(["traffic", "compare", *map(str, folders)]) == 2
    first, second = folders
    said = f"{first} and {second} are of runs that differ in {fields}: only connections may"
    assert capsys.readouterr().err == f"megatron-fc: {said}\n"


def test_reports_without_all_ranks_are_refused(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_report(folders[1], report_of([part(rank, steps=1 if rank == 2 else 2) for rank in range(7)]))
    assert main(["traffic", "compare", *map(str, folders)]) == 2
    assert f"{folders[1]} lacks ranks 2, 7, wholly or in part, and so cannot be compared" in capsys.readouterr().err


def test_a_plot_that_cannot_be_written_is_one_sentence(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traffic", "compare", *map(str, folders), "--plot", "/dev/null/x/y.png"]) == 2
    assert "/dev/null/x/y.png cannot be written, Not a directory: give another --plot" in capsys.readouterr().err


def test_a_report_that_is_given_twice_is_refused(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folders
    assert main(["traffic", "compare", str(first), str(second), str(first / "traffic.json")]) == 2
    assert f"{first} is given twice: give each report once" in capsys.readouterr().err
