"""Availability of the Triton kernels, found out without importing them."""

import torch

from megatron_fc.connections.base import ConnectionConfig

TRITON_SLOTS = (1, 2, 4, 8, 16)
# Where kernels run. The meta device runs none: shapes are all that is asked for. A driver for tensors of another device
# adds it, such as that of the emulator in benchmarks/laboratory.
DEVICES = frozenset({"cuda", "meta"})


def without_kernels(config: ConnectionConfig) -> str | None:
    """Say what of a configuration the kernels do not have, None if they have all."""
    if config.slots in TRITON_SLOTS:
        return None
    return f"the kernels are for {config.slots_option} {', '.join(map(str, TRITON_SLOTS))}, not {config.slots}"


def has_main_kernels(slots: int, fractions: int, given: bool = False) -> bool:
    """Whether there are kernels of their own for this shape, beside those that do every shape.

    given: coefficients come from elsewhere, as those on a manifold.
    """
    return (slots in ((2,) if given else (2, 4, 8)) and fractions == slots) or (slots in (2, 4) and fractions == 1)


def triton_obstacle(device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Say why the Triton kernels cannot run on streams of such a device and dtype, None if they can."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if device not in DEVICES and not knobs.runtime.interpret:
        return f"tensors are on {device}, Triton needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels are for fp32, fp16 and bf16, not {dtype}"
    return None
