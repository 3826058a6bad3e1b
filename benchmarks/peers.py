"""Predicted, not measured: kernels of others under the ruler that ours are under, RMSNorm and mHC. No GPU is needed.

    python benchmarks/peers.py --sources FOLDER ...                     # to results/peers-h200.{md,json}
    python benchmarks/peers.py --only Liger-Kernel --width 2048
    python benchmarks/peers.py --ours      # ours, predicted anew, beside the others as they were recorded

Liger-Kernel is installed into .cache/ where it is not there yet. The others are run from folders outside the project,
and nothing of theirs is committed: checkouts of Megatron-LM's branch dev, of TileKernels and of TransformerEngine, and
a folder that `pip install --target FOLDER tilelang` filled; TileKernels also needs nvcc.

Triton's autotuner takes the fastest of its candidates on a card. Here that is the one with the shortest prediction, for
a quarter of the tokens at the first width, and every width takes it.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import calibrate
import record
from laboratory.simulator.assumptions import H200, fingerprint
from laboratory.simulator.core import STARTS
from launched import BYTES, Launched, launched, rows_moved
from megatron_fc.errors import UserError
from peer_builds import FOLDERS, Cut, N, Peer, source_file
from peer_kernels import FILES, LIGER, MEGATRON, PEERS, TE, TILE, TOKENS
from predict import NOTICED, Prediction, predicted, read

OURS, WIDTHS = "megatron_fc", (2048, 4096)
KINDS = {N: "DFC", 1: "DHC"}  # by fractions
PACKAGES = (LIGER, TE, MEGATRON, TILE)


@dataclass(frozen=True)
class Row:
    """A kernel at a width, or why it is not predicted; rows of d elements in bf16 per token, shares in per cent.

    Attributes:
        needs, moves, torch: rows that it has to move, that the replay moves, and that torch moves around it.
        us: of the mid case.
        program: tokens and columns, and warps.
    """

    package: str
    kernel: str
    width: int
    needs: int = 0
    moves: float = 0
    torch: int = 0
    mid: float = 0
    low: float = 0
    us: float = 0
    limit: str = ""
    program: str = ""
    registers: int = 0
    stack: int = 0
    reason: str = ""


def peer_row(peer: Peer, width: int) -> Row:
    if peer.reason:
        return Row(peer.package, peer.name, width, reason=peer.reason)
    try:
        cut = fastest(peer) if len(peer.cuts(width)) > 1 else peer.cuts(width)[0]
        found = peer.launched(width, cut)
    except LookupError as error:
        return Row(peer.package, peer.name, width, peer.needs, reason=f"the reader does not follow it: {error}")
    program = f"{cut.tokens} × {peer.columns(width, cut)}, {cut.warps}"
    return row(peer.package, found, predicted(found, TOKENS), peer.needs, peer.torch, program)


def row(
    package: str, of: Launched, share: Prediction, needs: int, torch: int, program: str, name: str | None = None
) -> Row:
    kernel, width = of.kernel, of.shape.width
    copied = TOKENS * needs * width * BYTES
    moves = kernel.dram_bytes(H200) / (of.tile_tokens * width * BYTES)
    us = copied / (H200.copy_tbs * 1e6) / (share.mid / 100)
    numbers = (round(moves, 2), torch, share.mid, share.low, round(us, 1), share.limit)
    return Row(
        package,
        of.shape.kernel if name is None else name,
        width,
        needs,
        *numbers,
        program,
        kernel.registers,
        kernel.stack,
    )


@functools.cache
def fastest(peer: Peer) -> Cut:
    """Of an autotuned kernel's cuts, those left out that the reader does not follow.

    Raises:
        LookupError: it follows none.
    """
    cuts, times = peer.cuts(WIDTHS[0]), {}
    seed, skew = STARTS[0]
    for cut in cuts:
        try:
            found = peer.launched(WIDTHS[0], cut)
        except LookupError:
            continue
        tiles = int(TOKENS / 4 / found.tile_tokens)
        times[cut] = found.kernel.simulate(H200, tiles, found.programs, seed, skew).us
    if not times:
        raise LookupError(f"none of its {len(cuts)} cuts")
    return min(times, key=lambda cut: times[cut])


def our_rows(widths: Sequence[int]) -> Iterator[Row]:
    """As they were recorded last."""
    for share in read(record.RESULTS / "predicted-h200.json"):
        if (share.slots, share.tokens) == (N, TOKENS) and share.width in widths and share.rate in KINDS:
            found, needs = launched(share.shape), int(rows_moved(share.shape))
            program = f"{found.tile_tokens} × {share.width}, {found.kernel.warps}"
            yield row(OURS, found, share, needs, 0, program, f"{KINDS[share.rate]}x{N} {share.kernel}")


def page(result: dict[str, Any], rows: Iterable[Row]) -> str:
    columns = (
        "package", "kernel", "limited by", "d", "has to move", "moves", "bytes per token", "torch besides", "mid, %",
        "low, %", "us", "program", "registers, stack",
    )  # fmt: skip
    predictions = [r for r in rows if not r.reason]
    lines = [
        (
            r.package, r.kernel, r.limit, str(r.width), str(r.needs), f"{r.moves:.2f}",
            f"{r.moves * r.width * BYTES:.0f}", str(r.torch or ""),
            f"{'≤ ' * bool(r.stack)}{r.mid:.0f}", f"{r.low:.0f}", f"{r.us:.0f}", r.program, f"{r.registers}, {r.stack}",
        )
        for r in predictions
    ]  # fmt: skip
    absent = [(r.package, r.kernel, str(r.width or "all"), r.reason) for r in rows if r.reason]
    sources = "".join(f"* {name}: {source}\n" for name, source in result["sources"].items())
    return (
        record.heading("Predicted, not measured: kernels of others under the same ruler", result)
        + f"Assumptions {result['assumptions']}. {TOKENS:,} tokens in bf16, mHC with n = {N} streams of width d; means "
        f"of {len(STARTS)} starts. **Differences below {NOTICED:.0f} points mean nothing.** Share: time of a copy of "
        "the bytes that a kernel has to move by its predicted time. A kernel has to move every stream that it reads or "
        "writes once, in bf16. has to move, moves, torch besides: rows of d elements in bf16 per token. What torch "
        "moves besides, to cast, is in no share. ≤: registers spill, which costs nothing here. program: tokens × "
        "columns, warps. [How, and what this is worth]"
        f"(../../docs/laboratory.md#peers).\n\n{record.table(columns, lines, left=3)}\n## Not predicted\n\n"
        + record.table(("package", "kernel", "d", "why"), absent, left=4)
        + f"\n## Sources\n\n{sources}"
    )


def sources(packages: Iterable[str]) -> dict[str, str]:
    """Version or commit of each. What is imported is put on the path: not TransformerEngine, which is not built.

    Raises:
        UserError: one is missing.
    """
    found = {}
    for package in packages:
        if package == LIGER:
            calibrate.install()
            found[package] = f"{calibrate.VERSION} from PyPI"
            continue
        for name in (package, "tilelang") if package == TILE else (package,):
            path, what = FILES[name]
            try:
                file = source_file(path)
            except FileNotFoundError:
                raise UserError(f"--sources has no {path}, which {package} needs: add {what}, or use --only") from None
            if name in (MEGATRON, "tilelang"):
                sys.path.insert(0, str(file.parents[path.count("/")]))
            is_pypi = name == "tilelang"
            found[name] = f"{version(name)} from PyPI" if is_pypi else f"{what[2:]} at {record.commit(file.parent)}"
    return found


def refresh() -> None:
    """Record ours anew beside what was recorded of others."""
    stored = json.loads((record.RESULTS / "peers-h200.json").read_text())
    others = [found for found in (Row(**row) for row in stored["rows"]) if found.package != OURS]
    rows = [*our_rows(WIDTHS), *others]
    record.write(record.RESULTS, "peers", stored | {"rows": [asdict(r) for r in rows]}, page(stored, rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, nargs="+", default=[], metavar="FOLDER", help="checkouts and packages")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}")
    parser.add_argument("--kernel", nargs="+", choices=sorted({p.name for p in PEERS}), metavar="NAME")
    parser.add_argument("--width", type=int, nargs="+", choices=WIDTHS, help=f"default {WIDTHS}")
    parser.add_argument("--ours", action="store_true", help="take ours anew from the last predictions, nothing else")
    parser.add_argument("--output", type=Path, help=f"folder; default {record.RESULTS} where everything is predicted")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    output = args.output or (None if args.only or args.kernel or args.width else record.RESULTS)
    result = record.facts("cpu") | {"machine": "H200", "assumptions": fingerprint()}
    if args.ours:
        refresh()
        return 0
    FOLDERS[:] = args.sources
    packages = args.only or PACKAGES
    result["sources"] = sources(packages)
    rows = list(our_rows(args.width or WIDTHS)) if output else []
    chosen = [p for p in PEERS if p.package in packages and (not args.kernel or p.name in args.kernel)]
    for peer in chosen:
        for width in (0,) if peer.reason else args.width or WIDTHS:
            rows.append(found := peer_row(peer, width))
            share = found.reason or f"{found.mid:.0f} (low {found.low:.0f}), {found.moves:.2f} rows, {found.us:.0f} us"
            print(f"{found.package}, {found.kernel}, {width or 'all'}: {share}", flush=True)
    if output:
        record.write(output, "peers", result | {"rows": [asdict(r) for r in rows]}, page(result, rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
