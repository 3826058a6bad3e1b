"""Availability of the Triton kernels, found out without importing them."""

import torch

from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.config import FracConfig, HyperConfig

TRITON_SLOTS = (1, 2, 4, 8)
# Where kernels run. The meta device runs none: shapes are all that is asked for. A driver for tensors of another device
# adds it, such as that of the emulator in benchmarks/laboratory.
DEVICES = frozenset({"cuda", "meta"})


def without_kernels(config: ConnectionConfig) -> str | None:
    """Say which part of a configuration the kernels do not have, None if they have all."""
    if config.slots not in TRITON_SLOTS:
        known = ", ".join(map(str, TRITON_SLOTS))
        return f"the kernels are for {config.slots_option} {known}, not {config.slots}"
    if not isinstance(config, FracConfig | HyperConfig):
        return None
    options = {
        "norm_affine": config.norm_affine or not config.dynamic,
        "dynamic_beta": config.dynamic_beta is None,
        "dynamic_alpha": config.dynamic_alpha is None,
    }
    unknown = next((name for name, known in options.items() if not known), None)
    return None if unknown is None else f"the kernels do not have {unknown}=False"


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
