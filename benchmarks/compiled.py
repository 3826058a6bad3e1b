"""Compile every kernel for GPUs that need not be there, and read registers, spills and instructions off the binary.

python benchmarks/compiled.py                            # sm_90, all shapes, to benchmarks/results/compiled-sm90.md
python benchmarks/compiled.py --arch 80 --width 2048 --rate 4
python benchmarks/compiled.py --width 2048 --slots 4     # Hyper-Connections: more slots than fractions
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from laboratory.simulator import sass
from megatron_fc import FracConfig, HyperConfig
from megatron_fc.connections.kernels import cuts, launch
from megatron_fc.connections.kernels.depth import depth_backward_kernel, depth_forward_kernel
from megatron_fc.connections.kernels.gluon import cuts as main_cuts
from megatron_fc.connections.kernels.sums import Partial
from megatron_fc.connections.kernels.tables import Given
from megatron_fc.connections.kernels.tiles import Site
from megatron_fc.connections.kernels.width import width_backward_kernel, width_forward_kernel
from megatron_fc.connections.norm import NormWeights
from megatron_fc.connections.operands import Operands
from megatron_fc.connections.per_slot import PerSlotParameters

WIDTHS, RATES, SLOTS, ARCHITECTURES = (2048, 4096, 7168), (2, 4, 8), (2, 4), (80, 90, 100)
RESULTS = Path(__file__).parent / "results"
STREAM, FP32 = "*bf16", "*fp32"
_P = PerSlotParameters(*[FP32] * 7)  # type: ignore[arg-type]
_NO_P = PerSlotParameters(*[None] * 7)  # type: ignore[arg-type]
_NORM = launch.Weights(STREAM, None)  # type: ignore[arg-type]
_PARTIAL = Partial(FP32, FP32, FP32, None, FP32)  # type: ignore[arg-type]
_DEPTH = launch.DepthInputs(STREAM, STREAM, FP32, FP32)  # type: ignore[arg-type]
_BACK = _DEPTH._replace(h=None, alpha=None, g_o=STREAM, g_beta=FP32)  # type: ignore[arg-type]
_BIAS_DROPOUT = {"bias": STREAM, "seed": "*i64", "dropout": 0.1}
_FORWARD = {"h": STREAM, "given": Given(), "p": _P, "norm": _NORM, "x": STREAM, "beta": FP32, "alpha": FP32}
_GRADIENTS = {"g_x": STREAM, "g_beta": FP32, "g_mixed": STREAM, "h": STREAM, "given": Given(), "p": _P, "norm": _NORM}
_BACKWARD = {**_GRADIENTS, "g_h": STREAM, "partial": _PARTIAL}
_NO_COEFFICIENTS = {"beta": None, "alpha": None}
_DEPTH_KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "depth forward": (depth_forward_kernel, {"pre": _DEPTH, "out": STREAM}),
    "depth backward": (depth_backward_kernel, {"g": STREAM, "pre": _BACK, "partial": Partial()}),
}
_WIDTH_KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "width forward": (width_forward_kernel, {**_FORWARD, "pre": launch.DepthInputs(dropout=0.0)}),
    "width backward": (width_backward_kernel, {**_BACKWARD, "pre": launch.DepthInputs(dropout=0.0)}),
    "boundary forward": (width_forward_kernel, {**_FORWARD, "pre": _DEPTH}),
    "boundary backward": (width_backward_kernel, {**_BACKWARD, "pre": _BACK}),
}
# With coefficients that torch has made, as those on a manifold.
_GIVEN_KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "given width forward": (
        width_forward_kernel,
        {**_FORWARD, "pre": launch.DepthInputs(dropout=0.0), "given": Given(FP32), "p": _NO_P, **_NO_COEFFICIENTS},  # type: ignore[arg-type]
    ),
    "given width backward": (
        width_backward_kernel,
        {
            **_BACKWARD,
            "pre": launch.DepthInputs(dropout=0.0),
            "given": Given(*[FP32] * 4),  # type: ignore[arg-type]
            "p": _NO_P,
            "g_beta": None,
            "partial": Partial(weight=FP32),  # type: ignore[arg-type]
        },
    ),
}
GENERAL = ", general"
# By name; what has a main kernel is that, where there is one, and besides the general kernel under another name.
KERNELS = {
    **_WIDTH_KERNELS,
    **_DEPTH_KERNELS,
    **_GIVEN_KERNELS,
    # With the bias and dropout of Megatron's slot.
    "boundary forward, b+d": (width_forward_kernel, {**_FORWARD, "pre": _DEPTH._replace(**_BIAS_DROPOUT)}),
    "boundary backward, b+d": (
        width_backward_kernel,
        {**_BACKWARD, "pre": _BACK._replace(**_BIAS_DROPOUT), "partial": _PARTIAL._replace(output_bias=FP32)},  # type: ignore[arg-type]
    ),
    **{name + GENERAL: kernel for name, kernel in (_WIDTH_KERNELS | _GIVEN_KERNELS).items()},
}
# What is recorded: of Frac-Connections all but what manifolds need; of wider streams all but bias and dropout.
FRAC = tuple(name for name in KERNELS if not name.startswith("given"))
HYPER = tuple(name for name in KERNELS if not name.endswith("b+d"))
# Shared memory that a program may have, by architecture.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Shape(NamedTuple):
    """A kernel at a width d, with m fractions (Frac-Connections call them the rate) and n slots."""

    kernel: str
    width: int
    rate: int
    slots: int


def shapes(
    kernels: Sequence[str] | None, widths: Sequence[int], rates: Sequence[int] | None, slots: Sequence[int] | None
) -> list[Shape]:
    """Those chosen: without slots as many as fractions, with slots and without fractions one."""
    if slots:
        return [Shape(*key) for key in itertools.product(kernels or HYPER, widths, rates or (1,), slots)]
    return [Shape(*key, key[-1]) for key in itertools.product(kernels or FRAC, widths, rates or RATES)]


def recorded(arch: int) -> list[Shape]:
    """What the table of an architecture holds: of wider streams the widths that are predicted."""
    return shapes(None, WIDTHS, None, None) + shapes(None, WIDTHS[:2], None, SLOTS)


@dataclass(frozen=True)
class Compiled:
    """What the binary of one kernel says."""

    registers: int
    stack: int
    shared: int
    warps: int
    spills: int
    wide: int
    tensor_core: int


def compile_kernel(shape: Shape, arch: int) -> Compiled:
    """Compile one kernel as `launch` would launch it on bf16 streams, norm in the same pass."""
    binary, found = binary_of(shape, arch)
    registers, stack = sass.usage(binary.asm["cubin"])
    code = sass.disassemble(binary.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Compiled(
        registers=registers,
        stack=stack,
        shared=binary.metadata.shared,
        warps=found.site.W,
        spills=count(r"\b(?:LDL|STL)\b"),
        wide=count(r"\b(?:LDG|STG)\.E\S*\.128"),
        tensor_core=count(r"\bH(?:G)?MMA\b"),
    )


class Launch(NamedTuple):
    """A kernel, main or general, and how the work is cut."""

    kernel: Any
    site: Site
    cut: cuts.Cut


def binary_of(shape: Shape, arch: int) -> tuple[Any, Launch]:
    """What Triton made of a kernel, with its texts in `asm`, and how it is launched."""
    found = launched_as(shape, arch)
    source = _source(found.kernel, KERNELS[shape.kernel][1], found.site)
    options = cuts.options(found.site, found.cut)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), found


def launched_as(shape: Shape, arch: int) -> Launch:
    """The kernel that `launch` takes at a shape."""
    name, width, m, n = shape
    kernel, arguments = KERNELS[name]
    config = FracConfig(rate=m) if m == n else HyperConfig(slots=n, fractions=m)
    with torch.device("meta"):
        stream = torch.empty(16, config.stream_width(width), dtype=torch.bfloat16)
        p = PerSlotParameters(**{name: torch.empty(s) for name, s in config.parameter_shapes(width).items()})
    norm = NormWeights("rmsnorm", stream[0]) if "norm" in arguments else None
    operands = Operands.of(p, config) if arguments.get("p") is _P else None
    direction: main_cuts.Direction = "backward" if "backward" in name else "forward"
    cut = cuts.DEPTH
    if name not in _DEPTH_KERNELS:
        cut = cuts.cut_for(cuts.WIDTH_BACKWARD if direction == "backward" else cuts.WIDTH, width // m)
    site = cuts.site_of(cut, stream, n, m, operands, norm)
    main: main_cuts.Main | str | None = None
    if name in _WIDTH_KERNELS or name in _GIVEN_KERNELS:
        given = name in _GIVEN_KERNELS
        main = main_cuts.planned(direction, site, "boundary" in name, SHARED_MEMORY[arch], given)
    elif name == "depth forward":
        main = main_cuts.planned_depth(site, SHARED_MEMORY[arch])
    if isinstance(main, main_cuts.Main):
        return Launch(main.kernel, main.site, launch.cut_of(main))
    return Launch(kernel, site, cut)


def parameters_of(name: str) -> list[str]:
    """Names of a kernel's run-time parameters in order; a field of a tuple is `pre.h`."""
    kernel, arguments = KERNELS[name]
    given = {**arguments, "count": "i32"}

    def names(prefix: str, value: Any) -> Iterator[str]:
        if isinstance(value, tuple):
            for field, item in zip(value._fields, value, strict=True):
                yield from names(f"{prefix}.{field}", item)
        elif value is not None:
            yield prefix

    return [found for name in kernel.arg_names if name != "S" for found in names(name, given[name])]


def _source(kernel: Any, arguments: dict[str, Any], site: Site) -> ASTSource:
    """The kernel with pointers of these types, all on 16-byte boundaries; None is an argument that is not there."""
    given = {**arguments, "count": "i32"}
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, *place: int) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(kind(item, *place, i) for i, item in enumerate(value)))
        if value is None:
            constants[place] = None
            return "constexpr"
        if isinstance(value, float):
            return "fp32"  # the dropout's probability
        if value.startswith("*"):
            attributes[place] = [["tt.divisibility", 16]]
        return value

    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name == "S" else kind(given[name], i)
    constants[(kernel.arg_names.index("S"),)] = Site(*map(tl.constexpr, site))
    kind_of_source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return kind_of_source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def table_path(arch: int) -> Path:
    return RESULTS / f"compiled-sm{arch}.md"


def row(shape: Shape, compiled: Compiled) -> str:
    return f"| {' | '.join(map(str, (*shape, *astuple(compiled))))} |"


def read_table(arch: int) -> dict[Shape, Compiled]:
    """The table of an architecture."""
    table = {}
    for line in table_path(arch).read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name in KERNELS:
            width, rate, slots, *numbers = map(int, cells)
            table[Shape(name, width, rate, slots)] = Compiled(*numbers)
    return table


def rows(chosen: Sequence[Shape], arch: int) -> Iterator[str]:
    yield "| kernel | d | m | n | registers | stack | shared | warps | spills | 128-bit | tensor core |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for shape in chosen:
        yield row(shape, compile_kernel(shape, arch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, e.g. 80, 90, 100")
    parser.add_argument("--width", type=int, nargs="+", help=f"default {WIDTHS}")
    parser.add_argument("--rate", type=int, nargs="+", help="fractions m")
    parser.add_argument("--slots", type=int, nargs="+", help="slots n, where they are not as many")
    args = parser.parse_args()
    lines = []
    some = args.width or args.rate or args.slots
    chosen = shapes(None, args.width or WIDTHS, args.rate, args.slots) if some else recorded(args.arch)
    for line in rows(chosen, args.arch):
        print(line, flush=True)
        lines.append(line)
    if not some:
        command = f"python benchmarks/compiled.py --arch {args.arch}"
        versions = f"Triton {triton.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
        text = f"# Compiled kernels, sm_{args.arch}\n\n`{command}`, {versions}, bf16 streams, RMSNorm in the pass.\n\n"
        RESULTS.mkdir(exist_ok=True)
        table_path(args.arch).write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
