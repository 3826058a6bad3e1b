"""Availability of the Triton kernels, found out without importing them."""

import torch

from megatron_fc.connections.config import FracConfig

TRITON_RATES = (1, 2, 4, 8)
# Where kernels run. The meta device runs none: shapes are all that is asked for. A driver for tensors of another device
# adds it, such as that of the emulator in benchmarks/laboratory.
DEVICES = frozenset({"cuda", "meta"})


def unknown_option(config: FracConfig) -> str | None:
    """Name the option that the kernels do not have, None if they have all."""
    options = {
        "norm_affine": config.norm_affine or not config.dynamic,
        "dynamic_beta": config.dynamic_beta is None,
        "dynamic_alpha": config.dynamic_alpha is None,
    }
    return next((f"{name}=False" for name, known in options.items() if not known), None)


def triton_obstacle(
    rate: int, device: str, dtype: torch.dtype = torch.float32, option: str | None = None
) -> str | None:
    """Say why the Triton kernels cannot run, None if they can; `option` as `unknown_option` says."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if device not in DEVICES and not knobs.runtime.interpret:
        return f"tensors are on {device}, Triton needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    if rate not in TRITON_RATES:
        return f"the kernels are for rate {', '.join(map(str, TRITON_RATES))}, not {rate}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels are for fp32, fp16 and bf16, not {dtype}"
    return None if option is None else f"the kernels do not have {option}"
