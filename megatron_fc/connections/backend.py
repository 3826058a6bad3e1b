"""The choice of a backend: Triton's fused kernels on CUDA devices, hand-written torch elsewhere."""

import functools
import logging

import torch
from torch import Tensor

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import Backend, FracConfig
from megatron_fc.connections.kernels.availability import triton_obstacle, unknown_option
from megatron_fc.errors import UserError


def choose_backend(config: FracConfig, stream: Tensor) -> str:
    """Return the backend for a residual stream, triton or torch, and announce it once.

    Raises:
        UserError: Triton was asked for and cannot run; the message says why.
    """
    return _announced(config.backend, config.rate, unknown_option(config), stream.device.type, stream.dtype)


def backend_on(
    wanted: Backend, rate: int, device: str, dtype: torch.dtype = torch.float32, option: str | None = None
) -> tuple[str, str]:
    """Return the backend of a site on a type of device, and in a few words why.

    `option` as `unknown_option` says.

    Raises:
        UserError: Triton was asked for and cannot run; the message says why.
    """
    obstacle = None if wanted == "torch" else triton_obstacle(rate, device, dtype, option)
    if wanted == "triton" and obstacle:
        raise UserError(f"backend=triton cannot run: {obstacle}; set backend=auto or backend=torch")
    if wanted == "torch":
        return "torch", "as asked for"
    return ("torch", obstacle) if obstacle else ("triton", "fused kernels")


def backend_of(connection: ConnectionConfig, device: str) -> tuple[str, str]:
    """Return the backend of a connection of any kind on a type of device, and in a few words why.

    Raises:
        UserError: Triton was asked for and cannot run; the message says why.
    """
    if isinstance(connection, FracConfig):
        return backend_on(connection.backend, connection.rate, device, option=unknown_option(connection))
    return "torch", f"the kernels are for Frac-Connections, not for {connection.label}"


@torch.compiler.assume_constant_result  # which torch.compile need not look into
def _announced(wanted: Backend, rate: int, option: str | None, device: str, dtype: torch.dtype) -> str:
    chosen, reason = backend_on(wanted, rate, device, dtype, option)
    _announce(chosen, reason, rate, device, dtype)
    return chosen


@functools.cache
def _announce(chosen: str, reason: str, rate: int, device: str, dtype: torch.dtype) -> None:
    """Log a choice, once for each kind of stream."""
    logging.getLogger("megatron_fc").info("Frac-Connections run on %s: %s", chosen, reason)
