"""The choice of a backend: Triton's fused kernels on CUDA devices, hand-written torch elsewhere."""

import functools
import logging

import torch
from torch import Tensor

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kernels.availability import triton_obstacle, without_kernels
from megatron_fc.errors import UserError


def choose_backend(config: ConnectionConfig, stream: Tensor) -> str:
    """Return the backend for a residual stream, triton or torch, and announce it once.

    Raises:
        UserError: Triton was asked for and cannot run; the message says why.
    """
    return _announced(config.backend, config.label, without_kernels(config), stream.device.type, stream.dtype)


def backend_of(config: ConnectionConfig, device: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Return the backend of a connection on a type of device, and in a few words why.

    Raises:
        UserError: Triton was asked for and cannot run; the message says why.
    """
    return _backend_on(config.backend, without_kernels(config), device, dtype)


def _backend_on(wanted: str, lacks: str | None, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The same for a connection of which the kernels lack this part."""
    if wanted == "torch":
        return "torch", "as asked for"
    obstacle = triton_obstacle(device, dtype) or lacks
    if wanted == "triton" and obstacle:
        raise UserError(f"backend=triton cannot run: {obstacle}; set backend=auto or backend=torch")
    return ("torch", obstacle) if obstacle else ("triton", "fused kernels")


@torch.compiler.assume_constant_result  # which torch.compile need not look into
def _announced(wanted: str, label: str, lacks: str | None, device: str, dtype: torch.dtype) -> str:
    chosen, reason = _backend_on(wanted, lacks, device, dtype)
    _announce(chosen, reason, label, device, dtype)
    return chosen


@functools.cache
def _announce(chosen: str, reason: str, label: str, device: str, dtype: torch.dtype) -> None:
    """Log a choice, once for each kind of stream."""
    logging.getLogger("megatron_fc").info("%s connections run on %s: %s", label, chosen, reason)
