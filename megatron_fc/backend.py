"""Which implementation runs: Triton's fused kernels on CUDA devices, hand-written torch elsewhere."""

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from megatron_fc.config import Backend
from megatron_fc.errors import UserError

TRITON_RATES = (1, 2, 4, 8)


def choose_backend(wanted: Backend, rate: int, stream: Tensor) -> Literal["triton", "torch"]:
    """Return the backend for a stream and announce it once.

    Args:
        wanted: auto takes Triton where it can run.
        rate: frac-rate m.
        stream: any residual stream of the model, for its device and dtype.

    Raises:
        UserError: Triton was asked for and cannot run; the message says why.
    """
    return _choose(wanted, rate, stream.device.type, stream.dtype)


@functools.cache
def _choose(wanted: Backend, rate: int, device: str, dtype: torch.dtype) -> Literal["triton", "torch"]:
    chosen: Literal["triton", "torch"]
    obstacle = None if wanted == "torch" else triton_obstacle(rate, device, dtype)
    if wanted == "triton" and obstacle:
        raise UserError(f"backend=triton cannot run: {obstacle}; set backend=auto or backend=torch")
    if wanted == "torch":
        chosen, reason = "torch", "as asked for"
    elif obstacle:
        chosen, reason = "torch", obstacle
    else:
        chosen, reason = "triton", "fused kernels"
    logging.getLogger("megatron_fc").info("Frac-Connections run on %s: %s", chosen, reason)
    return chosen


def triton_obstacle(rate: int, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Say why the Triton kernels cannot run, None if they can."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"Triton is not installed ({error})"
    # The meta device runs no kernel: shapes are all that is asked for.
    if device not in ("cuda", "meta") and not knobs.runtime.interpret:
        return f"tensors are on {device}, Triton needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    if rate not in TRITON_RATES:
        return f"the kernels are for rate {', '.join(map(str, TRITON_RATES))}, not {rate}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels are for fp32, fp16 and bf16, not {dtype}"
    return None
