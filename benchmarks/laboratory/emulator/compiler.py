"""Triton's compiler for NVIDIA's GPUs up to PTX: what `ptxas` would make of it is not run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend


class PTXBackend(CUDABackend):
    """The compiler without its last stage; the name under which it keeps kernels is its own, too."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


@contextmanager
def compiling_to_ptx() -> Iterator[None]:
    """Triton compiles no further than PTX."""
    before = backends["nvidia"]
    backends["nvidia"] = Backend(PTXBackend, before.driver)
    try:
        yield
    finally:
        backends["nvidia"] = before
