"""Marks of operations in a profile; on a card, the times of their kernels."""

from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from megatron_fc.planning.counts import DeviceKey
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.kernel_times import KernelTimes, copy_bytes_per_second, seconds_by_key
from megatron_fc.profiling.counters.phase import Whereabouts


def event(name: str, microseconds: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_time_total=microseconds, device_type=device)


def test_kernels_are_summed_under_their_marks() -> None:
    mark = "megatron_fc|backward|decoder.layers.0.mlp|aten.mm"
    events = [
        event(mark, 10.0),
        event(mark, 15.0),
        event(mark, 900.0, DeviceType.CUDA),  # the mark on the device
        event("aten::mm", 25.0),
        event("megatron_fc|optimizer||aten._foreach_add_", 5.0),
    ]
    seconds = seconds_by_key(events)
    assert seconds == {
        DeviceKey("backward", "decoder.layers.0.mlp", "aten.mm"): pytest.approx(25e-6),
        DeviceKey("optimizer", "", "aten._foreach_add_"): pytest.approx(5e-6),
    }


def profiled(device: str) -> tuple[KernelTimes, DeviceCounter]:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).to(device)
    x = torch.randn(32, 64, device=device)
    with Whereabouts(model) as whereabouts, KernelTimes(whereabouts) as times, DeviceCounter(whereabouts) as counter:
        model(x).sum().backward()
    return times, counter


def test_every_counted_key_is_marked() -> None:
    times, counter = profiled("cpu")
    assert {key.module for key in counter.counts} == {"", "0", "1", "2"}
    assert set(counter.counts) <= set(times.seconds())


@pytest.mark.gpu
def test_kernels_on_a_card_have_times() -> None:
    times, counter = profiled("cuda")
    seconds = times.seconds()
    for key in counter.counts:
        assert seconds[key] > 0, key
    moved = sum(count.read_bytes + count.written_bytes for count in counter.counts.values())
    assert moved / sum(seconds[key] for key in counter.counts) < 2 * copy_bytes_per_second()
