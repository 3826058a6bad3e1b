"""Time of every operation of a Frac-Connection, forward and backward, against its rivals and against a plain copy.

    python benchmarks/kernels.py                    # DFC and SFC, x2 and x4, d = 2048 and 4096
    python benchmarks/kernels.py --quick            # DFCx4, d = 2048
    python benchmarks/kernels.py --device cpu       # does it run? The figures say nothing.

All contestants of an operation take turns in one process, with a copy among them whose bandwidth is the scale. On CUDA
they are called directly and replayed from CUDA graphs, on streams of 128 MiB, which no L2 cache holds. Backward is what
forward and backward take beyond forward. See benchmarks/README.md.
"""

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

import options
import record
from case import Absent, Case, Program, difference
from clock import Times, beyond, median, said, take_turns
from contestants import COMPILED, EAGER, FUSED, OPERATIONS, Contestant, contestants
from megatron_fc.connections.costs.traffic import Stream
from megatron_fc.errors import UserError

DTYPE = torch.bfloat16
WIDTHS, ELEMENTS = (2048, 4096), 2**26
# bf16 streams, each rounded once; gradients of x are rounded on the way, too.
TOLERANCE = 3e-2
COPY = "copy"


@dataclass
class Row:
    """One contestant on one operation. Times are in ms; `absent` and `error` say why there are none."""

    connection: str
    width: int
    tokens: int
    operation: str
    contestant: str
    ours: bool
    bytes_forward: int
    bytes_backward: int
    absent: str = ""
    error: str = ""
    graph_error: str = ""
    difference: float | None = None
    direct_forward_ms: float | None = None
    direct_backward_ms: float | None = None
    replayed_forward_ms: float | None = None
    replayed_backward_ms: float | None = None
    forward_gb_per_s: float | None = None
    backward_gb_per_s: float | None = None
    forward_share_of_copy: float | None = None
    backward_share_of_copy: float | None = None

    @property
    def failed(self) -> bool:
        """Whether one of ours did not run, as a call or from a graph, or computes something else."""
        return self.ours and bool(self.error or self.graph_error)

    @property
    def forward_ms(self) -> float | None:
        return self.replayed_forward_ms if self.replayed_forward_ms is not None else self.direct_forward_ms

    @property
    def backward_ms(self) -> float | None:
        return self.replayed_backward_ms if self.replayed_backward_ms is not None else self.direct_backward_ms


def measure(operation: str, case: Case, rounds: int) -> list[Row]:
    """Let all contestants of an operation take turns."""
    rows: list[Row] = []
    programs: dict[str, Program] = {}
    for contestant in contestants(operation, case):
        row = _row(case, operation, contestant)
        rows.append(row)
        try:
            programs[row.contestant] = contestant.build()
        except Absent as absent:
            row.absent = str(absent)
        except Exception as error:
            row.error = said(error)
    # In a whole layer, all of the work of both is in outputs and gradients.
    reference = programs.get(EAGER) if operation == "layer" else None
    source = torch.randn(4 * case.tokens, case.width, dtype=DTYPE, device=case.device)
    target = torch.empty_like(source)
    functions: dict[Any, Any] = {(COPY, "forward"): lambda: target.copy_(source)}
    for name, program in programs.items():
        functions |= {(name, "forward"): program.forward, (name, "both"): program.both}
    times = take_turns(functions, case.device, rounds, case.h.nbytes)
    copied = times[COPY, "forward"]
    copy_ms = median(copied.replayed) or median(copied.direct)
    scale = None if copy_ms is None else 2 * source.nbytes / copy_ms / 1e6
    for row in rows:
        if row.contestant in programs:
            _fill(row, times[row.contestant, "forward"], times[row.contestant, "both"], scale)
            if row.ours and reference is not None and not row.error:
                _compare(row, programs[row.contestant], reference)
    return rows


def _row(case: Case, operation: str, contestant: Contestant) -> Row:
    name, _, moves, ours = contestant
    stream = Stream(case.width, DTYPE.itemsize)
    moved = OPERATIONS[operation](stream, case.config) if moves is None else moves(stream)
    passes = (int(traffic.total_bytes(case.tokens)) for traffic in (moved.forward, moved.backward))
    return Row(case.config.label, case.width, case.tokens, operation, name, ours, *passes)


def _fill(row: Row, forward: Times, both: Times, scale: float | None) -> None:
    row.error = forward.error or both.error
    row.graph_error = forward.graph_error or both.graph_error
    row.direct_forward_ms, row.direct_backward_ms = median(forward.direct), beyond(both.direct, forward.direct)
    row.replayed_forward_ms = median(forward.replayed)
    row.replayed_backward_ms = beyond(both.replayed, forward.replayed)
    row.forward_gb_per_s = _rate(row.bytes_forward, row.forward_ms)
    row.backward_gb_per_s = _rate(row.bytes_backward, row.backward_ms)
    if scale is not None:
        row.forward_share_of_copy = row.forward_gb_per_s and row.forward_gb_per_s / scale
        row.backward_share_of_copy = row.backward_gb_per_s and row.backward_gb_per_s / scale


def _rate(moved: int | None, milliseconds: float | None) -> float | None:
    """GB/s; None where nothing moves or nothing was measured."""
    return moved / milliseconds / 1e6 if moved and milliseconds else None


def _compare(row: Row, program: Program, reference: Program) -> None:
    """A fast wrong result is no result."""
    try:
        row.difference = difference(program, reference)
    except Exception as error:
        row.error = said(error)
        return
    if not row.difference <= TOLERANCE:
        row.error = f"streams differ from the reference's by {row.difference:.1e}, more than {TOLERANCE:.0e}"


def not_measured(operation: str, case: Case, absent: str = "", error: str = "") -> list[Row]:
    """Rows of an operation that was not begun, or that none of its contestants came out of."""
    rows = [_row(case, operation, contestant) for contestant in contestants(operation, case)]
    for row in rows:
        row.absent, row.error = absent, error
    return rows


def compile_ahead(cases: list[tuple[Any, ...]], workers: int, seconds: float) -> None:
    """Compile our kernels and the compiled reference in processes side by side, into the caches on disk.

    A backward kernel takes up to some ten seconds, one after another they would use up the budget. What goes wrong here
    goes wrong again where it is measured, and is reported there.
    """
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # whose end terminates what still runs
        pool.starmap_async(_compile, cases, chunksize=1).wait(seconds)


def _compile(operation: str, *case: Any) -> None:
    for contestant in contestants(operation, Case(*case)):
        # The kernels of a layer are those of its parts.
        if contestant.name == COMPILED or (contestant.name == FUSED and operation != "layer"):
            with suppress(Exception):
                contestant.build().both()
    torch.cuda.empty_cache()


COLUMNS = ("operation", "contestant", "forward ms", "GB/s", "of copy", "backward ms", "GB/s", "of copy")
COLUMNS = (*COLUMNS, "called: forward ms", "backward ms", "time against fused kernels")


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """Rows of the Markdown table of one case: who was measured, or failed."""
    fused = {row.operation: row for row in rows if row.contestant == FUSED}
    for row in rows:
        if row.absent:
            continue
        if row.error:
            yield [row.operation, f"{row.contestant}: **{row.error}**", *[""] * (len(COLUMNS) - 2)]
            continue
        note = f" (no CUDA graph: {row.graph_error})" if row.graph_error else ""
        total, own = _total(row), _total(fused[row.operation])
        yield [
            row.operation,
            row.contestant + note,
            *(_number(row.forward_ms, ".3f"), _number(row.forward_gb_per_s, ".0f")),
            _number(row.forward_share_of_copy, ".0%"),
            *(_number(row.backward_ms, ".3f"), _number(row.backward_gb_per_s, ".0f")),
            _number(row.backward_share_of_copy, ".0%"),
            *(_number(row.direct_forward_ms, ".3f"), _number(row.direct_backward_ms, ".3f")),
            _number(total / own if total and own else None, ".2f"),
        ]


def absences(rows: list[Row]) -> str:
    """Who is missing, for what reason, on which operations; one line each."""
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.absent:
            missing.setdefault((row.contestant, row.absent), []).append(row.operation)
    return "".join(f"* {name} ({', '.join(where)}): {why}\n" for (name, why), where in missing.items())


def _total(row: Row) -> float | None:
    return None if row.forward_ms is None or row.backward_ms is None else row.forward_ms + row.backward_ms


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def report(result: dict[str, Any], rows: list[Row]) -> str:
    text = record.heading("Operations of a Frac-Connection", result)
    if not result["machine_is_gpu"]:
        text += (
            "\n**On a CPU, by the host's clock, kernels interpreted if at all: no time here says anything of a GPU.**\n"
        )
    for case in dict.fromkeys((row.connection, row.width, row.tokens) for row in rows):
        own = [row for row in rows if (row.connection, row.width, row.tokens) == case]
        text += f"\n## {case[0]}, d = {case[1]}, {case[2]:,} tokens, bf16\n\n" + record.table(COLUMNS, lines(own), 2)
        missing = absences(own)
        text += f"\nNot there:\n\n{missing}" if missing else ""
    return text


def main() -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--connections", nargs="+", choices=options.CONNECTIONS, default=options.CONNECTIONS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--tokens", type=int, help="default: streams of 128 MiB")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="DFCx4 with d = 2048 only")
    parser.add_argument("--workers", type=int, help="processes that compile ahead; default half the cores, on cpu none")
    args = options.parse(parser)
    if args.quick:
        args.connections, args.widths = options.CONNECTIONS[:1], WIDTHS[:1]
    budget, device = options.Budget(args.budget), torch.device(args.device)
    cases = [
        (options.connection(name), width, args.tokens or ELEMENTS // width)
        for width in args.widths
        for name in args.connections
    ]
    workers = args.workers if args.workers is not None else (os.cpu_count() or 2) // 2 if device.type == "cuda" else 0
    if workers:
        ahead = [(operation, *case, DTYPE, device) for case in cases for operation in OPERATIONS]
        compile_ahead(ahead, min(workers, 8, len(ahead)), max(0.0, min(0.6 * budget.left, 1e6)))
        print(f"compiled ahead in {budget.spent:.0f} s", flush=True)
    result = record.facts(args.device) | {"machine_is_gpu": record.on_gpu(args.device), "rounds": args.rounds}
    rows: list[Row] = []
    for config, width, tokens in cases:
        case = Case(config, width, tokens, DTYPE, device)
        for operation in OPERATIONS:
            if budget.left <= 0:
                rows += not_measured(operation, case, f"not measured, the budget of {args.budget:.0f} s was spent")
            else:
                try:
                    gc.collect()
                    torch.cuda.empty_cache()
                    rows += measure(operation, case, args.rounds)
                except Exception as error:  # one kernel's illegal access is everybody's
                    rows += not_measured(operation, case, error=said(error))
            print(f"{config.label}, d = {width}, {operation}: {budget.spent:.0f} s", flush=True)
            if args.output:  # now, in case that the run is ended from outside
                stored = result | {"rows": [asdict(row) for row in rows]}
                record.write(args.output, "kernels-quick" if args.quick else "kernels", stored, report(result, rows))
    print(report(result, rows))
    for row in rows:
        if row.failed:
            print(f"failed: {row.operation}, {row.contestant}: {row.error or row.graph_error}", file=sys.stderr)
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
