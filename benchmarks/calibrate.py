"""Published H100 times of streaming kernels against the simulator's. No GPU is needed.

    python benchmarks/calibrate.py        # to benchmarks/results/calibration-h100.{md,json}

The kernels are those of the package liger-kernel, compiled here by Triton for sm_90 and replayed; the package is
installed into .cache/ where it is not there yet. benchmarks/laboratory/published-h100.csv has the published times:

* Liger: benchmark/data/all_benchmark_data.csv of github.com/linkedin/Liger-Kernel at ead96b61: medians, on an
  H100 80GB HBM3.
* QuACK: media/bf16_kernel_benchmarks_single_row.svg of github.com/Dao-AILab/quack at c8ec3170, curves of Liger Kernel
  v0.5.10 on an H100 80GB HBM3; GB/s read off the vector figure's coordinates, time = bytes read and written once by it.
"""

import argparse
import csv
import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import record
from laboratory.simulator.assumptions import H100, LAUNCH_US, fingerprint
from laboratory.simulator.core import STARTS
from laboratory.simulator.kernel import Kernel, Parameter, Partial, Role, Stream, Token
from megatron_fc.errors import UserError

VERSION = "0.8.2"  # of liger-kernel: the first with all of these kernels
PACKAGE = Path(__file__).parents[1] / ".cache" / f"liger-kernel-{VERSION}"
PUBLISHED = Path(__file__).parent / "laboratory" / "published-h100.csv"
WITHIN = 0.10
ITEM_BYTES = {"bf16": 2, "fp32": 4}
LLAMA = 0  # the casting mode that is Liger's default
PROCESSORS = int(H100.processors)


@dataclass(frozen=True)
class Published:
    """One published time, of a kernel on `rows` rows of `width` elements."""

    kernel: str
    source: str
    rows: int
    width: int
    dtype: str
    us: float
    use: str  # `calibration`, `added` to it later, or why it is left out


@dataclass(frozen=True)
class Compared(Published):
    predicted_us: float

    @property
    def ratio(self) -> float:
        return self.predicted_us / self.us


@dataclass(frozen=True)
class Recipe:
    """How one of Liger's functions launches its kernel.

    Attributes:
        module, kernel: names below liger_kernel.ops.
        arguments: of rows, width and stream pointer: the call's arguments in order; a string is a pointer's type.
        roles: of the pointers that are no parameters; a stream's bytes are those of a row, times the number given.
        persistent: one program per processor goes over rows.
        copies: of a stream, which the published call makes besides: autograd copies a gradient that two inputs share.
    """

    module: str
    kernel: str
    arguments: Callable[[int, int, str], Sequence[Any]]
    roles: Mapping[str, int | Role]
    persistent: bool = False
    copies: int = 0


RECIPES = {
    "relu-squared forward": Recipe(
        "relu_squared", "_relu_squared_forward_kernel", lambda r, w, p: (p, w, p, w, w), {"Y_ptr": 1, "X_ptr": 1}
    ),
    "relu-squared backward": Recipe(
        "relu_squared",
        "_relu_squared_backward_kernel",
        lambda r, w, p: (p, w, p, w, p, w, w),
        {"dX_ptr": 1, "dY_ptr": 1, "X_ptr": 1},
    ),
    "layer norm forward": Recipe(
        "layer_norm",
        "_layer_norm_forward_kernel",
        lambda r, w, p: (p, w, p, w, p, 1, p, 1, p, 1, p, 1, w, 1e-6),
        {"Y_ptr": 1, "X_ptr": 1, "Mean_ptr": Token(), "RSTD_ptr": Token()},
    ),
    "add + RMSNorm forward": Recipe(
        "fused_add_rms_norm",
        "_fused_add_rms_norm_forward_kernel",
        lambda r, w, p: (p, w, p, w, p, w, p, w, p, 1, "*fp32", 1, w, 1e-6, 0.0, LLAMA),
        {"Y_ptr": 1, "S_ptr": 1, "X_ptr": 1, "R_ptr": 1, "RSTD_ptr": Token()},
    ),
    "add + RMSNorm backward": Recipe(
        "fused_add_rms_norm",
        "_fused_add_rms_norm_backward_kernel",
        lambda r, w, p: (
            p, w, p, w, p, w, p, w, tl.float32, p, 1, "*fp32", 1, "*fp32", w, r, w, 0.0,
            -(-r // PROCESSORS), LLAMA, triton.next_power_of_2(w), True,
        ),
        {"dY_ptr": 1, "dS_out_ptr": 1, "dX_ptr": 1, "X_ptr": 1, "RSTD_ptr": Token(), "dW_ptr": Partial()},
        persistent=True,
        copies=1,
    ),
    "SwiGLU forward": Recipe(
        "swiglu",
        "_swiglu_fused_gate_up_forward_kernel",
        lambda r, w, p: (p, p, 2 * w, w, w),
        {"y_ptr": 2, "c_ptr": 1},
    ),
    "RMSNorm forward": Recipe(  # row by row, which is all that v0.5.10 had; later versions take blocks of narrow rows
        "rms_norm",
        "_rms_norm_forward_kernel",
        lambda r, w, p: (p, w, p, w, p, 1, "*fp32", 1, w, 1e-6, 0.0, LLAMA, True),
        {"Y_ptr": 1, "X_ptr": 1, "RSTD_ptr": Token()},
    ),
    "softmax forward": Recipe(
        "softmax", "_softmax_single_block_forward_kernel", lambda r, w, p: (p, w, p, w, w), {"Y_ptr": 1, "X_ptr": 1}
    ),
}  # fmt: skip


def published() -> list[Published]:
    with PUBLISHED.open(newline="") as file:
        return [
            Published(kernel, source, int(rows), int(width), dtype, float(us), use)
            for kernel, source, rows, width, dtype, us, use in list(csv.reader(file))[1:]
        ]


def install() -> None:
    """Make liger-kernel importable, from .cache/.

    Raises:
        UserError: pip cannot install it.
    """
    if not PACKAGE.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PACKAGE)]
        done = subprocess.run([*command, f"liger-kernel=={VERSION}"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"liger-kernel=={VERSION} cannot be installed into {PACKAGE}: {done.stderr.strip()}")
    sys.path.insert(0, str(PACKAGE))


def compiled(case: Published) -> Kernel:
    """The kernel of a case as its function launches it."""
    recipe = RECIPES[case.kernel]
    module = importlib.import_module(f"liger_kernel.ops.{recipe.module}")
    kernel = getattr(module, recipe.kernel)
    block, warps = importlib.import_module("liger_kernel.ops.utils").calculate_settings(case.width)
    given = dict(zip(kernel.arg_names, recipe.arguments(case.rows, case.width, f"*{case.dtype}"), strict=False))
    given.setdefault("BLOCK_SIZE", block)

    def role(pointer: str) -> Role:
        found = recipe.roles.get(pointer, Parameter())
        return Stream(found * case.width * ITEM_BYTES[case.dtype]) if isinstance(found, int) else found

    return kernel_of(kernel, given, role, {"num_warps": warps}, persistent=recipe.persistent)


def kernel_of(
    kernel: Any,
    given: Mapping[str, Any],
    role_of: Callable[[str], Role],
    options: Mapping[str, int],
    trips: int = 1,
    persistent: bool = False,
) -> Kernel:
    """A kernel as Triton compiles it for a call: ones are constants, multiples of 16 are known as such.

    Args:
        given: arguments by name; a string is a pointer's type.
        options: Triton's, `num_warps` among them.
        role_of, trips, persistent: as of `Kernel`.
    """
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for k, (name, value) in enumerate((name, given[name]) for name in kernel.arg_names):
        if name in constant or (isinstance(value, int) and value == 1):
            signature[name], constants[(k,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = value if isinstance(value, str) else "i32"
            if isinstance(value, str) or value % 16 == 0:
                attributes[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
    names = [name for name in kernel.arg_names if signature[name] != "constexpr"]
    shared, warps = binary.metadata.shared, options["num_warps"]
    return Kernel(binary.asm["cubin"], binary.asm["ptx"], names, role_of, warps, shared, trips, persistent)


def compare(case: Published) -> Compared:
    recipe, kernel = RECIPES[case.kernel], compiled(case)
    programs = 1 if recipe.persistent else None
    runs = [kernel.simulate(H100, case.rows, programs, seed, skew).us for seed, skew in STARTS]
    copy_us = 2 * case.rows * case.width * ITEM_BYTES[case.dtype] / (H100.copy_tbs * 1e6) + LAUNCH_US
    return Compared(**asdict(case), predicted_us=round(statistics.mean(runs) + LAUNCH_US + recipe.copies * copy_us, 1))


def summary(found: Sequence[Compared]) -> str:
    ratios = [case.ratio for case in found]
    near = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    return (
        f"{len(ratios)} cases, mean {statistics.mean(ratios):.2f}, {near} within {WITHIN:.0%}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}"
    )


def page(result: dict[str, Any], found: Sequence[Compared], absent: Iterable[Published]) -> str:
    """Every case, what was left out, and the totals."""
    columns = ("kernel", "source", "dtype", "rows", "width", "published, us", "simulated, us", "ratio")
    text = (
        record.heading("Simulated against published H100 times", result)
        + f"Assumptions {result['assumptions']}; liger-kernel {VERSION} for sm_90; {LAUNCH_US:.0f} us of launch are "
        f"added; means of {len(STARTS)} starts. `benchmarks/calibrate.py` has the sources. "
        "[What this is worth](../../docs/laboratory.md).\n"
    )
    for use, title in (
        ("calibration", "The calibration"),
        ("added", "Further published cases"),
    ):
        chosen = [case for case in found if case.use == use]
        lines = [
            (c.kernel, c.source, c.dtype, *map(str, (c.rows, c.width, c.us, c.predicted_us)), f"{c.ratio:.2f}")
            for c in chosen
        ]
        text += f"\n## {title}\n\n{summary(chosen)}.\n\n{record.table(columns, lines, left=3)}"
    left_out = [(c.kernel, c.source, c.use.partition(": ")[2], *map(str, (c.rows, c.width, c.us))) for c in absent]
    headings = ("kernel", "source", "why", "rows", "width", "published, us")
    return f"{text}\n## Left out\n\n{record.table(headings, left_out, left=3)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder")
    args = parser.parse_args()
    install()
    result = record.facts("cpu") | {"machine": "H100", "assumptions": fingerprint()}
    cases, found = published(), []
    for case in (case for case in cases if not case.use.startswith("left out")):
        found.append(one := compare(case))
        print(
            f"{one.kernel}, {one.source}, {one.width}: {one.predicted_us:.1f} of {one.us:.1f} us, {one.ratio:.2f}",
            flush=True,
        )
    result |= {
        "summary": summary([c for c in found if c.use == "calibration"]),
        "rows": [asdict(case) for case in found],
    }
    absent = [case for case in cases if case.use.startswith("left out")]
    record.write(args.output, "calibration", result, page(result, found, absent))
    print(result["summary"])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
