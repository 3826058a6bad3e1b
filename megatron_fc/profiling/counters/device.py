"""DeviceCounter: bytes of device memory that a training step reads and writes, by phase, module and operation."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fc.planning.counts import DeviceCount, DeviceCounts, DeviceKey
from megatron_fc.profiling.counters.operations import moved
from megatron_fc.profiling.counters.phase import Whereabouts


class DeviceCounter(TorchDispatchMode):
    """Counts within its context, on CPU, meta and CUDA tensors alike, without changing a result.

    While such a mode is active torch runs what is under `torch.compile` uncompiled, and so it counts.

    It sees what passes torch's dispatcher, backward and recompute included: operations of torch and custom operations
    of any library; `megatron_fc::frac_*` count as their fused kernels move bytes. Kernels that a library launches past
    the dispatcher are not seen (Transformer Engine, Apex), nor what a CUDA graph replays.

    Every operation costs Python on the host, whatever its size (docs/traffic.md says how much): times under it do not
    count.

    Args:
        whereabouts: entered before the counter, left after it.
        device: type of the device whose memory counts, say "cuda" where some tensors are on the host; None for all.

    Attributes:
        counts: so far; what moves nothing has no entry.
    """

    def __init__(self, whereabouts: Whereabouts, device: str | None = None) -> None:
        super().__init__()
        self.counts: DeviceCounts = {}
        self._whereabouts, self._device = whereabouts, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = _inside(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        out = func(*args, **kwargs)
        read, written = moved(func, args, kwargs, out, self._device)
        if read or written:
            key = DeviceKey(*self._whereabouts.now(), str(getattr(func, "overloadpacket", func)))
            self.counts.setdefault(key, DeviceCount()).add(DeviceCount(1, read, written))
        return out


@cache
def _inside(func: Any) -> Callable[..., Any] | None:
    """What an operation consists of, where its parts are what moves bytes."""
    # Below autograd, torch hands over operations such as `reshape` and `matmul` in one piece.
    kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in _COMPOSITE_CPU_CUDA]
    return func.decompose if kernels == [True, False, False] else None


_COMPOSITE_CPU_CUDA = ("CompositeImplicitAutograd", "CPU", "CUDA")
