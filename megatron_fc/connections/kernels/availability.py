"""Availability of the Triton kernels, found out without importing them."""

import torch

TRITON_RATES = (1, 2, 4, 8)


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
