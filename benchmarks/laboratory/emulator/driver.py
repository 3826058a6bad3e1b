"""A driver for Triton whose GPU is the emulator: `kernel[grid](...)` compiles for a GPU and runs on CPU tensors.

with emulated(arch=90):
    kernel[(4,)](x, y, n, BLOCK=128)  # x and y are CPU tensors
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from laboratory.emulator.compiler import compiling_to_ptx
from laboratory.emulator.options import Options, Statistics
from laboratory.emulator.run import run
from megatron_fc.connections.kernels import availability


class Emulator:
    """The driver, as Triton asks for it.

    Attributes:
        options: of every run; shared memory is as the kernel asks for it.
        edit: changes a kernel's PTX before it runs, given its name and text.
        launches: kernel names and what their runs took, in order.
        kept: arguments of launches, where somebody asks by a list that no address stands for two tensors.
    """

    def __init__(self, arch: int = 90, options: Options | None = None) -> None:
        self.arch, self.options = arch, options or Options()
        self.edit: Callable[[str, str], str] = lambda name, text: text
        self.launches: list[tuple[str, Statistics]] = []
        self.kept: list[Any] | None = None
        self.utils = _Utilities()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, text: str, packed: Any, *rest: Any) -> None:
            # Triton keeps what it compiled; the emulator may be another one by now.
            emulator = triton.runtime.driver.active
            arguments = flatten(source.signature, rest[3:])  # after launch metadata and two hooks
            options = replace(emulator.options, shared=metadata.shared)
            took = run(emulator.edit(metadata.name, text), (x, y, z), metadata.num_warps, arguments, options)
            emulator.launches.append((metadata.name, took))
            if emulator.kept is not None:
                emulator.kept.append(rest)

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device, so an architecture is one."""
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 2, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, str, int, int, int]:
        """Module, function, registers, spills and threads of a CTA at most; the function is its text."""
        return 1, kernel.decode(), 0, 0, 1024


@contextmanager
def emulated(arch: int = 90, options: Options | None = None) -> Iterator[Emulator]:
    """Triton kernels, those of custom ops too, run on CPU tensors: compiled for sm_`arch`, and in the emulator."""
    driver, devices, emulator = triton.runtime.driver, availability.DEVICES, Emulator(arch, options)
    before = driver._active
    driver.set_active(emulator)
    availability.DEVICES = devices | {"cpu"}
    try:
        with compiling_to_ptx():
            yield emulator
    finally:
        driver._active, availability.DEVICES = before, devices


def flatten(signature: dict[str, Any], values: Sequence[Any]) -> list[Any]:
    """Arguments of a kernel's parameters: those that are no constants, tuples item by item."""
    out: list[Any] = []

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for one, item in zip(kind, value, strict=True):
                add(one, item)
        elif kind != "constexpr":
            out.append(as_array(value) if kind.startswith("*") else value)

    for kind, value in zip(signature.values(), values, strict=True):
        add(kind, value)
    return out


def as_array(value: torch.Tensor | None) -> np.ndarray | None:
    """A CPU tensor's memory, from its first element to its last; bf16, which numpy lacks, as uint16."""
    if value is None:
        return None
    kind = np.dtype("uint16" if value.dtype == torch.bfloat16 else str(value.dtype).removeprefix("torch."))
    if not value.numel():
        return np.empty(0, kind)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    # Not by torch's numpy(), after which Megatron could not free the tensor's memory.
    memory = (ctypes.c_uint8 * (extent * kind.itemsize)).from_address(value.data_ptr())
    return np.frombuffer(memory, kind)
