"""Predicted, not measured: the share of an H200's copy bandwidth that every kernel reaches. No GPU is needed.

    python benchmarks/predict.py                      # all kernels and shapes, to results/predicted-h200.{md,json}
    python benchmarks/predict.py --kernel "width forward" --width 2048 --rate 4 --tokens 16384
    python benchmarks/predict.py --width 2048 --slots 4 --tokens 16384      # Hyper-Connections
    python benchmarks/predict.py --against benchmarks/results/predicted-h200.json        # exit code 1: 10 points lost
    python benchmarks/predict.py --sensitivity        # to results/sensitivity-h200.{md,json}

Kernels are compiled for sm_90 and replayed in the simulator; docs/laboratory.md says what that is worth. A share is the
time of a copy of the bytes that a kernel has to move by the predicted time, a mean over several starts.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import record
from compiled import KERNELS, RATES, SLOTS, Shape, shapes
from laboratory.simulator.assumptions import H200, H200_LOW, fingerprint
from laboratory.simulator.core import STARTS, Result
from launched import BYTES, ROWS, Launched, launched
from megatron_fc.errors import UserError

WIDTHS, TOKENS, OF_WIDER = (2048, 4096), (8192, 16384, 65536), (16384,)  # tokens also of wider streams
NOTICED = 10.0  # points; less means nothing
MAIN = tuple(ROWS)
VARIATIONS: dict[str, dict[str, float]] = {
    "as assumed": {},
    "HMMA 12 cycles": {"hmma": 12},
    "HMMA 16 cycles": {"hmma": 16},
    "shared-memory latency 45, barrier 40": {"shared_latency": 45, "barrier_latency": 40},
    "shared-memory cycles × 1.5": {"shared_scale": 1.5},
    "backlog 10,000 cycles": {"backlog": 10_000},
    "all, HMMA 16": {
        "hmma": 16, "shared_latency": 45, "barrier_latency": 40, "shared_scale": 1.5, "backlog": 10_000,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One kernel at one shape and number of tokens; shares in per cent of a copy's bandwidth."""

    kernel: str
    width: int
    rate: int
    slots: int
    tokens: int
    mid: float
    low: float
    limit: str

    @property
    def shape(self) -> Shape:
        return Shape(self.kernel, self.width, self.rate, self.slots)

    @property
    def place(self) -> str:
        return f"{self.kernel}, d = {self.width}, m = {self.rate}, n = {self.slots}, {self.tokens:,} tokens"


def predict(shape: Shape, tokens: int) -> Prediction:
    return predicted(launched(shape), tokens)


def predicted(found: Launched, tokens: int) -> Prediction:
    middle = found.runs(tokens, H200)
    low = found.share(found.runs(tokens, H200_LOW), tokens, H200_LOW)
    mid = found.share(middle, tokens, H200)
    return Prediction(*found.shape, tokens, round(mid, 1), round(low, 1), limit(found, mid, middle[0]))


def limit(found: Launched, share: float, run: Result) -> str:
    """The resource that is taken for most of the time, or what warps wait for where none is taken for 80 % of it."""
    kernel = found.kernel
    loads = {
        "DRAM": found.load(kernel.dram_bytes(H200) / H200.dram, H200),
        "issue": found.load(kernel.issue_cycles(), H200),
        "shared memory": found.load(kernel.shared_cycles(H200), H200),
        "tensor cores": found.load(kernel.tensor_cycles(H200), H200),
    }
    name, most = max(loads.items(), key=lambda item: item[1])
    if most * share / 100 >= 80:
        return name
    waits = {wait: part for wait, part in run.waits.items() if wait not in ("stall", "not chosen")}
    first, second, *_ = sorted(waits, key=lambda wait: -waits[wait])
    return f"latency: {first}, {second}"


def rows(predictions: Iterable[Prediction]) -> Iterator[list[str]]:
    """One row of the table per kernel and shape, token counts side by side."""
    for shape, group in itertools.groupby(predictions, key=lambda p: p.shape):
        shares, of = list(group), launched(shape)
        kernel = of.kernel
        moved = kernel.dram_bytes(H200) / (of.tile_tokens * shape.width * BYTES)
        loads = (kernel.issue_cycles(), kernel.shared_cycles(H200), kernel.tensor_cycles(H200))
        yield [
            *map(str, shape),
            " / ".join(f"{p.mid:.0f}" for p in shares),
            " / ".join(f"{p.low:.0f}" for p in shares),
            shares[len(shares) // 2].limit,
            f"{kernel.warps} × {min(of.programs, kernel.resident)}",
            f"{kernel.registers}, {kernel.stack}",
            str(kernel.shared),
            f"{len(kernel.body) * kernel.warps / of.tile_tokens:.0f}",
            *(f"{of.load(cycles, H200):.0f}" for cycles in loads),
            str(kernel.count("BAR")),
            f"{moved:.2f}",
        ]


def page(result: dict[str, Any], predictions: Sequence[Prediction]) -> str:
    counts = " / ".join(f"{tokens:,}" for tokens in sorted({p.tokens for p in predictions}))
    columns = (
        "kernel", "d", "m", "n", "mid, %", "low, %", "limited by", "warps × programs", "registers, stack", "shared",
        "instructions per token", "issue, %", "shared, %", "tensor, %", "barriers", "rows",
    )  # fmt: skip
    return (
        record.heading("Predicted, not measured: share of an H200's copy bandwidth", result)
        + f"Assumptions {result['assumptions']}. bf16 streams, RMSNorm in the pass, {counts} tokens (of wider streams "
        f"one of them); means of "
        f"{len(STARTS)} starts. Differences below {NOTICED:.0f} points mean nothing.\n\n"
        "mid, low: the case that is thought likely, and one in which everything is slower. issue, shared, tensor: time "
        "that these are taken, in per cent of a copy's. Stack in bytes per thread, shared memory in bytes per program, "
        "barriers per tile, rows of d elements in DRAM per token. [What this is worth](../../docs/laboratory.md).\n\n"
        + record.table(columns, rows(predictions), left=1)
    )


def compare(earlier: Sequence[Prediction], now: Sequence[Prediction]) -> tuple[str, list[str]]:
    """A table of both, and a sentence for each mid or low case that lost `NOTICED` points or more.

    Raises:
        UserError: they have nothing in common.
    """
    before = {(p.shape, p.tokens): p for p in earlier}
    lines, lost = [], []
    for p in now:
        old = before.get((p.shape, p.tokens))
        if old is None:
            continue
        lines.append([p.place, f"{old.mid:.0f}", f"{p.mid:.0f}", f"{old.low:.0f}", f"{p.low:.0f}", old.limit, p.limit])
        for case in ("mid", "low"):
            was, drop = getattr(old, case), getattr(old, case) - getattr(p, case)
            if drop >= NOTICED:
                lost.append(f"{p.place}: the {case} case fell from {was:.0f} % to {getattr(p, case):.0f} %")
    if not lines:
        raise UserError("--against FILE has none of these kernels, shapes and token counts: nothing can be compared")
    columns = ("kernel", "mid before", "mid now", "low before", "low now", "limited by before", "limited by now")
    return record.table(columns, lines), lost


def read(path: Path) -> list[Prediction]:
    """The predictions of a recorded file.

    Raises:
        UserError: there is none, or it is of other assumptions than these.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--against {path} is no recorded prediction: {error}") from error
    if stored.get("assumptions") != fingerprint():
        raise UserError(
            f"--against {path} was predicted under assumptions {stored.get('assumptions')}, these are {fingerprint()}: "
            "predict the old kernels again"
        )
    return [Prediction(**{"slots": row["rate"], **row}) for row in stored["rows"]]  # older ones have no slots


def sensitivity(chosen: Sequence[Shape], tokens: int) -> dict[str, dict[str, float]]:
    """The mid case of each kernel with each unchecked assumption varied, by kernel and variation."""
    found: dict[str, dict[str, float]] = {}
    for shape, (variation, values) in itertools.product(chosen, VARIATIONS.items()):
        assumed, of, name = replace(H200, **values), launched(shape), shape.kernel
        share = of.share(of.runs(tokens, assumed), tokens, assumed)
        found.setdefault(name, {})[variation] = round(share, 1)
        print(f"{name}, {variation}: {share:.0f} %", flush=True)
    return found


def sensitivity_page(result: dict[str, Any]) -> str:
    lines = [[name, *(f"{share:.0f}" for share in shares.values())] for name, shares in result["rows"].items()]
    return (
        record.heading("Predicted, not measured: what the unchecked assumptions decide", result)
        + f"Assumptions {result['assumptions']}. Share of an H200's copy bandwidth in per cent, mid case, d = "
        f"{result['width']}, m = {result['rate']}, n = {result['slots']}, "
        f"{result['tokens']:,} tokens, means of {len(STARTS)} starts. Each "
        "column has one assumption changed, the last all of them. "
        f"Differences below {NOTICED:.0f} points mean nothing.\n\n" + record.table(("kernel", *VARIATIONS), lines)
    )


def recorded() -> list[tuple[Shape, int]]:
    """What the table holds: shapes and tokens."""
    wider = itertools.product(shapes(None, WIDTHS, None, SLOTS), OF_WIDER)
    return [*itertools.product(shapes(None, WIDTHS, None, None), TOKENS), *wider]


def facts() -> dict[str, Any]:
    return record.facts("cpu") | {"machine": "H200", "assumptions": fingerprint()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=tuple(KERNELS), metavar="NAME", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--width", type=int, nargs="+", help=f"default {WIDTHS}")
    parser.add_argument("--rate", type=int, nargs="+", help=f"fractions m, default {RATES}, with --slots 1")
    parser.add_argument("--slots", type=int, nargs="+", help="slots n, default as many")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--against", type=Path, metavar="FILE", help="earlier predictions, to compare with")
    only.add_argument("--sensitivity", action="store_true", help="vary each unchecked assumption, d = 2048, m = 4")
    parser.add_argument("--output", type=Path, help=f"folder; default {record.RESULTS} where everything is predicted")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    chosen = (args.kernel, args.width, args.rate, args.slots, args.tokens)
    output = args.output or (None if any(chosen) or args.against else record.RESULTS)
    result = facts()  # of the sources that run, before anybody changes them
    if args.sensitivity:
        if any(given and len(given) > 1 for given in chosen[1:]):
            raise UserError("--sensitivity takes one --width, one --rate, one of --slots and one number of --tokens")
        widths, rates = args.width or [2048], args.rate or (None if args.slots else [4])
        varied, [tokens] = shapes(args.kernel or MAIN, widths, rates, args.slots), args.tokens or [16384]
        _, width, rate, slots = varied[0]
        shares = sensitivity(varied, tokens)
        result |= {"width": width, "rate": rate, "slots": slots, "tokens": tokens, "rows": shares}
        if output:
            record.write(output, "sensitivity", result, sensitivity_page(result))
        return 0
    earlier = read(args.against) if args.against else []
    predictions = []
    if any(chosen):
        widths, counts = args.width or WIDTHS, sorted(args.tokens or TOKENS)
        wanted = list(itertools.product(shapes(args.kernel, widths, args.rate, args.slots), counts))
    else:
        wanted = recorded()
    for shape, tokens in wanted:
        predictions.append(found := predict(shape, tokens))
        print(f"{found.place}: {found.mid:.0f} (low {found.low:.0f}), {found.limit}", flush=True)
    if output:
        result |= {"rows": [asdict(p) for p in predictions]}
        record.write(output, "predicted", result, page(result, predictions))
    if not args.against:
        return 0
    table, lost = compare(earlier, predictions)
    print(table, *lost, sep="\n")
    return int(bool(lost))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
