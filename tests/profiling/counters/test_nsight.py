"""Nsight's command lines, and the CSV of `ncu`.

`data/ncu_raw.csv` was written by hand in the format that the Nsight Compute CLI manual describes
(docs.nvidia.com/nsight-compute/NsightComputeCli: "Output Pages" for --page raw with --csv, "NVTX Filtering" for the
column of ranges, --print-units for units): messages that begin with ==, names, units, a line per kernel. No card was at
hand to record one.
"""

import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_fc.cli.main import main
from megatron_fc.errors import UserError
from megatron_fc.profiling.counters.nsight import DramCount, command_lines, range_name, read_dram
from megatron_fc.profiling.counters.phase import Place
from megatron_fc.profiling.files import write_part
from support.example_report import part

SAMPLE = Path(__file__).parent / "data" / "ncu_raw.csv"


def test_dram_bytes_by_phase_and_module() -> None:
    assert read_dram(SAMPLE) == {
        Place("forward", "decoder.layers.0.mlp.router"): DramCount(2, 1_048_576 + 4_096, 262_144 + 8_192),
        Place("forward", "decoder.layers.0.input_layernorm.connection"): DramCount(1, 2_097_152, 1_048_576),
        Place("optimizer", ""): DramCount(1, 512, 0),
        None: DramCount(1, 64, 64),  # NCCL's kernel
    }


def test_units_other_than_bytes_are_decimal(tmp_path: Path) -> None:
    text = SAMPLE.read_text().replace('"byte","byte"', '"Mbyte","Kbyte"').replace('"512","0"', '"2.5","640"')
    (tmp_path / "raw.csv").write_text(text)
    assert read_dram(tmp_path / "raw.csv")[Place("optimizer", "")] == DramCount(1, 2_500_000, 640_000)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("dram__bytes_write.sum", "dram__sectors.sum", "has no column dram__bytes_write.sum: profile with --metrics"),
        ("Push/Pop_Range", "Pushed", "has no column Push/Pop_Range: profile with --nvtx"),
        ('"byte","byte"', '"sector","byte"', "has '1,048,576' 'sector' for bytes: profile with --print-units"),
        ('"512","0"', '"n/a","0"', "has 'n/a' 'byte' for bytes"),
    ],
)
def test_another_csv_is_refused(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text(SAMPLE.read_text().replace(old, new))
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        read_dram(tmp_path / "raw.csv")


def test_no_csv(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.csv, No such file"):
        read_dram(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("==ERROR== no kernels were profiled\n")
    with pytest.raises(UserError, match=r"empty\.csv has no column dram__bytes_read\.sum"):
        read_dram(tmp_path / "empty.csv")


def test_names_of_ranges_are_read_back() -> None:
    """What one half of this file writes the other one reads."""
    place = Place("backward", "decoder.layers.12.self_attention.linear_qkv")
    assert range_name(place) == "backward decoder.layers.12.self_attention.linear_qkv"
    assert range_name(Place("optimizer", "")) == "optimizer -", "no space at the end, which a tool may drop"


def test_command_lines_profile_the_same_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["traffic", "run", "configs/olmoe_7b.yaml", "run_dir=a b", "--from-step", "20", "--steps", "1"]
    nsys, ncu = map(_words, command_lines(run, tmp_path))
    for words in (nsys, ncu):
        assert words[-len(run) - 4 :] == ["python", "-m", "megatron_fc", *run, "--nvtx"]
    assert nsys[0] == "nsys"
    assert "--capture-range=cudaProfilerApi" in nsys
    assert ncu[0] == "ncu"
    assert {"--profile-from-start=off", "--nvtx", "--csv", "--page=raw", "--print-units=base"} <= set(ncu)
    assert "--metrics=dram__bytes_read.sum,dram__bytes_write.sum" in ncu

    assert main([*run, "--nsight", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [_words(line)[0] for line in printed] == ["nsys", "ncu"]
    assert _words(printed[1])[-len(run) - 3 :] == [*run, "--out", str(tmp_path), "--nvtx"]


def _words(line: str) -> list[str]:
    """Of the program that a shell is to become."""
    shell, option, script = shlex.split(line)
    assert (shell, option) == ("sh", "-c")
    return shlex.split(script)[1:]


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"SLURM_PROCID": "3"}, 3),
        ({"OMPI_COMM_WORLD_RANK": "4"}, 4),
        ({"PMI_RANK": "5"}, 5),
        ({"RANK": "6", "SLURM_PROCID": "0"}, 6),
    ],
)
def test_every_rank_writes_a_file_of_its_own(variables: dict[str, str], rank: int, tmp_path: Path) -> None:
    """However it is started; programs that print their arguments stand for Nsight's."""
    out = tmp_path / "a folder"
    for name in ("nsys", "ncu"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    files = []
    for line in command_lines(["traffic", "run", "a.yaml"], out):
        environment = variables | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=True)
        files += [word.partition("=")[2] for word in done.stdout.splitlines() if word.startswith(("--out", "--log"))]
    assert files == [f"{out}/rank-{rank}", f"{out}/rank-{rank}.csv"]


def test_measured_beside_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file = write_part(tmp_path, part(0))
    assert main(["traffic", "dram", str(SAMPLE), str(file)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("│")[2].strip(): line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["decoder.layers.0.mlp.router"]] == [
        "forward", "decoder.layers.0.mlp.router", "2", "1.05 MB", "270 kB", "6.14 kB", "215.33",
    ]  # fmt: skip
    assert [cell.strip() for cell in rows["outside of our ranges"]][2:] == ["1", "64 B", "64 B", "", ""]
