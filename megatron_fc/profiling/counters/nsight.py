"""NVIDIA's Nsight on the same steps: ranges and capture, command lines, and the bytes that `ncu` measured in DRAM.

The format of `ncu --csv --page raw` is described in the Nsight Compute CLI manual (docs.nvidia.com/nsight-compute/
NsightComputeCli, "Output Pages", "NVTX Filtering" and the options --csv, --page and --print-units): a line of names, a
line of units, and a line per kernel; lines that begin with == are the tool's messages.
"""

import csv
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fc.errors import UserError
from megatron_fc.planning.counts import Phase
from megatron_fc.profiling.counters.phase import Place, Whereabouts
from megatron_fc.profiling.records import Part
from megatron_fc.profiling.units import show_bytes, show_count

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
_RANGES = "Push/Pop_Range"  # the column's whole name also lists the fields of a range
# With base units a figure is in bytes; without, the prefixes are decimal.
_UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}
_NO_MODULE = "-"
_RANGE = re.compile(rf":(?P<phase>{'|'.join(get_args(Phase))}) (?P<module>[^:\"]*)")
_RANK = "${RANK:-${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}}}"


class NsightRanges(TorchDispatchMode):
    """Within its context Nsight captures, and every operation is in an NVTX range named by its phase and module.

    Args:
        whereabouts: entered before, left after.
        in_whole_model: turns a module's path on this rank into that in the whole model.
    """

    def __init__(self, whereabouts: Whereabouts, in_whole_model: Callable[[str], str]) -> None:
        super().__init__()
        self._whereabouts, self._in_whole_model = whereabouts, in_whole_model

    def __enter__(self) -> Self:
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.cuda.synchronize()
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        phase, module = self._whereabouts.now()
        with torch.cuda.nvtx.range(range_name(Place(phase, self._in_whole_model(module)))):
            return func(*args, **(kwargs or {}))


def range_name(place: Place) -> str:
    """Name of the NVTX range of a place: `backward decoder.layers.0.mlp.router`, or `optimizer -` for no module."""
    return f"{place.phase} {place.module or _NO_MODULE}"


def command_lines(command: Sequence[str], out: Path) -> list[str]:
    """Return the `nsys` and the `ncu` command line that profile the same steps.

    Args:
        command: the words of `megatron-fc traffic run ...`, without the program's name.
        out: folder for what they write; every rank writes a file of its own. A shell names it by the rank that
            torchrun, SLURM or MPI set, 0 for a plain call: `ncu` documents no macros for the name of its log.
    """
    program = ["python", "-m", "megatron_fc", *command, "--nvtx"]
    file = f"{shlex.quote(str(out))}/rank-{_RANK}"
    nsys = ["nsys", "profile", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    ncu = ["ncu", "--profile-from-start=off", "--nvtx", f"--metrics={READ},{WRITTEN}", "--csv", "--page=raw"]
    ncu += ["--print-units=base", "--replay-mode=kernel"]
    return [
        _of_every_rank(f"{shlex.join(nsys)} --output={file} {shlex.join(program)}"),
        _of_every_rank(f"{shlex.join(ncu)} --log-file={file}.csv {shlex.join(program)}"),
    ]


def _of_every_rank(line: str) -> str:
    """Have a shell on the rank expand the line, not the one that starts srun or mpirun."""
    return shlex.join(["sh", "-c", f"exec {line}"])


@dataclass
class DramCount:
    """What `ncu` measured.

    Attributes:
        kernels: how many.
        read_bytes, written_bytes: of DRAM.
    """

    kernels: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


def read_dram(path: Path) -> dict[Place | None, DramCount]:
    """Read the CSV that `ncu --csv --page raw` wrote, summed by the innermost range of ours; None is outside of these.

    Raises:
        UserError: the file is none of that kind, or lacks a metric or the ranges.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("==")]
    except OSError as error:
        raise UserError(f"cannot read {path}, {error.strerror}: give what `ncu --csv --page raw` wrote") from None
    table = csv.reader(lines)
    names, units = next(table, []), next(table, [])
    read, written = _column(path, names, READ), _column(path, names, WRITTEN)
    ranges = next((at for at, name in enumerate(names) if _RANGES in name), None)
    if ranges is None:
        raise UserError(f"{path} has no column {_RANGES}: profile with --nvtx")
    counts: dict[Place | None, DramCount] = {}
    for row in table:
        count = counts.setdefault(_place(row[ranges]), DramCount())
        count.kernels += 1
        count.read_bytes += _bytes(path, row[read], units[read])
        count.written_bytes += _bytes(path, row[written], units[written])
    return counts


def _place(ranges: str) -> Place | None:
    found = list(_RANGE.finditer(ranges))
    if not found:
        return None
    phase: Phase = found[-1]["phase"]  # type: ignore[assignment]  # the expression knows the phases
    module = found[-1]["module"]
    return Place(phase, "" if module == _NO_MODULE else module)


def _column(path: Path, names: Sequence[str], metric: str) -> int:
    if metric not in names:
        raise UserError(f"{path} has no column {metric}: profile with --metrics {READ},{WRITTEN} --csv --page raw")
    return names.index(metric)


def _bytes(path: Path, figure: str, unit: str) -> int:
    try:
        return round(float(figure.replace(",", "")) * _UNITS[unit])
    except (KeyError, ValueError):
        raise UserError(f"{path} has {figure!r} {unit!r} for bytes: profile with --print-units base") from None


def dram_table(measured: dict[Place | None, DramCount], part: Part) -> Table:
    """What `ncu` measured in DRAM beside what was counted, by phase and module of one rank, the busiest first.

    Caches make the measured bytes fewer, working memory of a kernel makes them more.
    """
    counted: dict[Place, int] = {}
    for key, count in part.device.items():
        at = Place(key.phase, key.module)
        counted[at] = counted.get(at, 0) + count.read_bytes + count.written_bytes
    table = Table(title=f"DRAM of rank {part.rank.rank}, {part.run.connection}, all profiled steps")
    for name in ("phase", "module"):
        table.add_column(name)
    for name in ("kernels", "read", "written", "counted", "measured / counted"):
        table.add_column(name, justify="right")
    for place, dram in sorted(measured.items(), key=lambda item: -(item[1].read_bytes + item[1].written_bytes)):
        figures = [show_count(dram.kernels), show_bytes(dram.read_bytes), show_bytes(dram.written_bytes)]
        if place is not None and place in counted:
            ratio = (dram.read_bytes + dram.written_bytes) / counted[place]
            figures += [show_bytes(counted[place]), f"{ratio:.2f}"]
        table.add_row(*(place or ("-", "outside of our ranges")), *figures)
    return table
