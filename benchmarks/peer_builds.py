"""Kernels of others, RMSNorm and mHC with four streams, compiled for sm_90 from their sources as their functions do it.

Liger-Kernel's and Megatron-LM's are Triton, TileKernels' TileLang, Transformer Engine's C++ that it compiles when it
runs; no GPU is needed for any. Rows are those of d elements in bf16 per token.
"""

import ctypes
import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.runtime import Autotuner

from calibrate import kernel_of
from compiled import Shape
from laboratory.simulator.assumptions import H200
from laboratory.simulator.kernel import Kernel, Parameter, Role, Stream
from launched import BYTES, Launched
from megatron_fc.errors import UserError

FOLDERS: list[Path] = []  # where sources outside the project lie; the command fills it
N = 4  # streams of mHC
FOLLOWED = 0.05  # a replay whose bytes differ by more from what the source moves has not followed it
TE_NAMES = "::transformer_engine::normalization::"
# Of the structure that TE's kernels take as their parameter (kernel_params.h): bits and name.
_BASE = "32 ctas_per_col 32 ctas_per_row 32 rows 32 cols 64 x 64 mu 64 rs 64 gamma 64 workspace 64 barrier 8 centred "
TE_FIELDS = {
    "fwd": _BASE + "64 z 64 beta 32 epsilon 64 scale 32 scale_bytes 64 scale_inv 64 amax 32 amax_bytes 8 fp8",
    "bwd": _BASE + "64 dz 64 add 64 dbeta_part 64 dgamma_part 64 dx 64 dbeta 64 dgamma",
}


@dataclass(frozen=True)
class Cut:
    """What a program takes at a time, in tokens and columns of d, and its warps and stages."""

    tokens: int
    columns: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, eq=False)
class Peer:
    """One kernel, or the reason why there is none to predict.

    Attributes:
        package, name: whose, and what it does.
        needs: rows that it has to move: every stream that it reads or writes, once, in bf16.
        roles: of the pointers that are no parameters; a stream's bytes per token and column of d.
        torch: rows that torch moves around it, to cast.
        place: module or file, and function.
        cut: of d.
        programs: per processor of a persistent kernel; 0: as many as fit.
        reason: why it is not predicted.
    """

    package: str
    name: str
    needs: int = 0
    roles: Mapping[str, int | Role] = field(default_factory=dict)
    torch: int = 0
    place: tuple[str, str] = ("", "")
    cut: Callable[[int], Cut] = lambda d: Cut(1, d)
    programs: int = 0
    reason: str = ""

    def cuts(self, width: int) -> Sequence[Cut]:
        """What it may be cut into: one, or all that its autotuner tries."""
        return (self.cut(width),)

    def compiled(self, width: int, cut: Cut) -> Kernel:
        raise NotImplementedError

    def columns(self, width: int, cut: Cut) -> int:
        """Of a program."""
        return cut.columns

    def launched(self, width: int, cut: Cut) -> Launched:
        """Compiled, and ready for the simulator.

        Raises:
            LookupError: the simulator's reader does not follow it.
        """
        kernel = self.compiled(width, cut)
        tokens = cut.tokens * self.columns(width, cut) / width  # whole tokens that move as much as a program
        rows = kernel.dram_bytes(H200) / (tokens * width * BYTES)
        moved = sum(found for found in self.roles.values() if isinstance(found, int)) / BYTES
        if abs(rows / moved - 1) > FOLLOWED:
            raise LookupError(f"the replay moves {rows:.1f} rows, the source {moved:.0f}")
        return Launched(
            Shape(self.name, width, N, N), kernel, self.programs, tokens, tokens * self.needs * width * BYTES
        )

    def role(self, pointer: str, width: int, cut: Cut) -> Role:
        found = self.roles.get(pointer, Parameter())
        return Stream(found * cut.tokens * self.columns(width, cut)) if isinstance(found, int) else found


@dataclass(frozen=True, eq=False)
class InTriton(Peer):
    """As Triton compiles it.

    Attributes:
        call: of d and the cut, the arguments in order.
        whole: a program goes over all columns in a loop.
        warps: of the autotuner's candidates those with so many, where all take too long to compile; 0: all.
    """

    call: Callable[[int, Cut], Sequence[Any]] = lambda d, cut: ()
    whole: bool = False
    warps: int = 0

    def cuts(self, width: int) -> Sequence[Cut]:
        configs = getattr(self._function(), "configs", None)
        if configs is None:
            return super().cuts(width)
        cuts = [Cut(c.kwargs["BLOCK_S"], c.kwargs["BLOCK_C"], c.num_warps, c.num_stages) for c in configs]
        return [cut for cut in cuts if self.warps in (0, cut.warps)]

    def columns(self, width: int, cut: Cut) -> int:
        return width if self.whole else cut.columns

    def compiled(self, width: int, cut: Cut) -> Kernel:
        function = self._function()
        kernel = function.fn if isinstance(function, Autotuner) else function
        given = dict(zip(kernel.arg_names, self.call(width, cut), strict=True))
        options = {"num_warps": cut.warps, "num_stages": cut.stages}
        trips = width // cut.columns if self.whole else 1
        return kernel_of(kernel, given, lambda name: self.role(name, width, cut), options, trips, bool(self.programs))

    def _function(self) -> Any:
        module, function = self.place
        return getattr(importlib.import_module(module), function)


@dataclass(frozen=True, eq=False)
class InTileLang(Peer):
    """Of TileKernels, a program per token; tilelang writes CUDA C++ and has nvcc compile it."""

    def compiled(self, width: int, cut: Cut) -> Kernel:
        import tilelang
        import tvm
        from tilelang.backend.target import determine_target
        from tilelang.contrib import nvcc

        file, name = self.place
        spec = importlib.util.spec_from_file_location(Path(file).stem, source_file(file))
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        function = getattr(module, name)
        target = determine_target({"kind": "cuda", "arch": "sm_90"}, return_object=True)
        config = {key.value: value for key, value in function.pass_configs.items()}
        with tvm.transform.PassContext(opt_level=3, config=config), target:
            lowered = tilelang.lower(function.get_tir(N, width), target=target)
        code = lowered.kernel_source
        level = function.pass_configs[tilelang.PassConfigKey.TL_PTXAS_REGISTER_USAGE_LEVEL]
        options = nvcc.default_compile_options([f"--ptxas-options=--register-usage-level={level}"])
        cubin, ptx = (
            bytes(nvcc.compile_cuda(code, kind, arch=["-arch=sm_90a"], options=options)) for kind in ("cubin", "ptx")
        )
        signature = re.findall(r"__global__ .*\((.*)\) {", code)[-1]
        names = [parameter.split()[-1] for parameter in signature.split(",")]
        launch = re.search(r"call_packed\(.* (\d+), 1, 1, (\d+)\)", str(lowered.host_mod))
        assert launch is not None, lowered.host_mod
        threads, shared = map(int, launch.groups())
        rounds = re.search(r"i0_h < (\d+)", code)  # the loop over columns, less what is before and behind it
        trips = int(rounds[1]) if rounds else 1
        return Kernel(
            cubin, ptx.decode(), names, lambda p: self.role(p, width, cut), threads // 32, shared, trips, False
        )


@dataclass(frozen=True, eq=False)
class InTransformerEngine(Peer):
    """RMSNorm, for which TE has NVRTC compile its source; the tuned kernel, as many programs as fit."""

    def compiled(self, width: int, cut: Cut) -> Kernel:
        source, direction = self.place
        across = cut.warps // cut.tokens
        dtypes = ", ".join(f"{TE_NAMES}{dtype}" for dtype in ("bf16", "bf16", "bf16", "fp32"))
        traits = f"{TE_NAMES}Kernel_traits<{dtypes}, uint32_t, {width}, 1, {cut.tokens}, {across}, 16>"
        residual = ", false" if direction == "bwd" else ""
        cubin = nvrtc(source_file(source), f"&{TE_NAMES}rmsnorm_{direction}_tuned_kernel<{traits}{residual}>")
        shared = 16 * cut.warps * (across > 1) + 4 * cut.tokens * width * (direction == "bwd")  # rtc_dispatch.cpp
        ptx, names = signature(TE_FIELDS[direction])
        return Kernel(cubin, ptx, names, lambda p: self.role(p, width, cut), cut.warps, shared)


def signature(fields: str) -> tuple[str, list[str]]:
    """A structure as if each field were a parameter, which lies at the same place: in PTX, and the names."""
    pairs = list(itertools.batched(fields.split(), 2))
    ptx = "\n".join([".entry", *(f".param .u{bits} _param_{k}" for k, (bits, _) in enumerate(pairs)), "{"])
    return ptx, [name for _, name in pairs]


def nvrtc(source: Path, expression: str) -> bytes:
    """A kernel's binary for sm_90, by the NVRTC that torch comes with.

    Raises:
        UserError: there is none, or it does not compile.
    """
    packages = Path(torch.__file__).parents[1]
    library = next(packages.glob("nvidia/*/lib/libnvrtc.so.*"), None)
    if library is None:
        raise UserError(f"Transformer Engine's kernels need NVRTC, of which there is none in {packages / 'nvidia'}")
    tool, program, size = ctypes.CDLL(str(library)), ctypes.c_void_p(), ctypes.c_size_t()
    folders = [source.parents[depth] for depth in (1, 2, 3)] + [library.parents[1] / "include"]
    options = [b"--std=c++17", b"--gpu-architecture=sm_90", *(f"-I{folder}".encode() for folder in folders)]
    tool.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    tool.nvrtcAddNameExpression(program, expression.encode())
    if tool.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        raise UserError(f"NVRTC does not compile {source}: is it Transformer Engine 2.20?")
    tool.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    tool.nvrtcGetCUBIN(program, binary)
    return binary.raw


def source_file(path: str) -> Path:
    """A file of a checkout.

    Raises:
        FileNotFoundError: none has it.
    """
    found = next((file for folder in FOLDERS if (file := folder / path).is_file()), None)
    if found is None:
        raise FileNotFoundError(path)
    return found
