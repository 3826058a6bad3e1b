"""Times of kernels on a CUDA device, by phase, module and operation; and how fast that device copies."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fc.planning.counts import DeviceKey
from megatron_fc.profiling.counters.phase import Whereabouts

_MARK, _BETWEEN = "megatron_fc", "|"
_COPY_BYTES = 1 << 28  # far more than caches hold, far less than a model leaves
_COPIES = 20


class KernelTimes(TorchDispatchMode):
    """Within its context, marks every operation for torch's profiler, which times the kernels that it launches (CUPTI).

    Keys are those of `DeviceCounter`, so that bytes and seconds can be divided.

    Args:
        whereabouts: entered before, left after.
    """

    def __init__(self, whereabouts: Whereabouts) -> None:
        super().__init__()
        self._whereabouts = whereabouts
        devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *devices])

    def __enter__(self) -> Self:
        self._profile.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = (*self._whereabouts.now(), str(getattr(func, "overloadpacket", func)))
        with record_function(_BETWEEN.join((_MARK, *key))):
            return func(*args, **(kwargs or {}))

    def seconds(self) -> dict[DeviceKey, float]:
        """Time of the kernels of each key; to be asked after the context."""
        return seconds_by_key(self._profile.events())


def seconds_by_key(events: Iterable[Any]) -> dict[DeviceKey, float]:
    """Sum the kernels' time under the marks.

    Args:
        events: of a profile. A mark also appears on the device, as a stretch with the gaps between its kernels: that
            one is left out.
    """
    seconds: dict[DeviceKey, float] = {}
    for event in events:
        mark, *key = event.name.split(_BETWEEN)
        if mark == _MARK and event.device_type == DeviceType.CPU:
            at = DeviceKey(*key)
            seconds[at] = seconds.get(at, 0.0) + event.device_time_total * 1e-6
    return seconds


def copy_bytes_per_second() -> float:
    """Bytes read and written per second by a copy of 256 MiB on the current CUDA device, the median of some."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = []
    for _ in range(_COPIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return 2 * _COPY_BYTES / (sorted(milliseconds)[_COPIES // 2] * 1e-3)
