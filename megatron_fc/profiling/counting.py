"""The counts of one rank in a window of steps, and the report of those of all ranks."""

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_fc.planning.counts import DeviceCount, DeviceCounts
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.kernel_times import KernelTimes, copy_bytes_per_second
from megatron_fc.profiling.counters.network import NetworkCounter
from megatron_fc.profiling.counters.nsight import NsightRanges
from megatron_fc.profiling.counters.phase import Whereabouts
from megatron_fc.profiling.counters.window import Window
from megatron_fc.profiling.files import clear, dump_part, parse_part, read_parts, write_part
from megatron_fc.profiling.gather import make_gatherer
from megatron_fc.profiling.groups import group_names
from megatron_fc.profiling.kinds import by_kind
from megatron_fc.profiling.records import Part, Rank, Report, Run, report_of
from megatron_fc.profiling.run_facts import coordinates, paths_in_whole_model
from megatron_fc.training import cpu_lane

_GATHERING = timedelta(seconds=60)


class Counting:
    """Counts on this rank, as the `Observer` of its window; every rank makes one while all are there.

    Args:
        run: what is counted, and in which steps.
        chunks: of this rank's model, unwrapped.
        hosts: of all ranks.
        out: folder of the report and of the parts that ranks leave there as they go; rank 0 removes those of an
            earlier run.
        nvtx: mark ranges for Nsight instead of timing kernels by torch's profiler.

    Attributes:
        window: to be told of steps and forward passes.
    """

    def __init__(self, run: Run, chunks: Sequence[Any], hosts: Sequence[str], out: Path, nvtx: bool = False) -> None:
        self.window = Window(run.from_step, run.steps, self)
        self._run, self._chunks, self._hosts, self._out, self._nvtx = run, chunks, hosts, out, nvtx
        self._gatherer = make_gatherer(_GATHERING)
        self._global_path: Callable[[str], str] = paths_in_whole_model(chunks)
        self._rank = Rank(torch.distributed.get_rank(), socket.gethostname(), coordinates())
        self._contexts = ExitStack()
        self._kernels: KernelTimes | None = None
        if self._rank.rank == 0:
            clear(out)

    def begin_counting(self) -> None:
        enter, on_cpu = self._contexts.enter_context, cpu_lane.needed()
        whereabouts = enter(Whereabouts(self._chunks))
        if self._nvtx:
            enter(NsightRanges(whereabouts, self._global_path))
        elif not on_cpu:  # Nsight and torch's profiler cannot both have the device's counters
            self._rank.copy_bytes_per_second = copy_bytes_per_second()
            self._kernels = enter(KernelTimes(whereabouts))
        self._network = enter(NetworkCounter(whereabouts, group_names(), self._hosts))
        self._device = enter(DeviceCounter(whereabouts, "cpu" if on_cpu else "cuda"))

    def step_counted(self) -> None:
        write_part(self._out, self._part())

    def end_counting(self) -> None:
        self.stop()
        if self._kernels is not None:
            for key, seconds in self._kernels.seconds().items():
                if key in self._device.counts:
                    self._device.counts[key].seconds = seconds
            write_part(self._out, self._part())

    def stop(self) -> None:
        """Count no more; also where the run fails."""
        self._contexts.close()

    def gather(self) -> Report | None:
        """Return the report on rank 0, None elsewhere; every rank calls it, its window being over."""
        texts = self._gatherer.gather(dump_part(self._part()))
        if self._rank.rank != 0:
            return None
        parts = {part.rank.rank: part for part in read_parts(self._out)}
        parts |= {part.rank.rank: part for part in (parse_part(text, "a gathered part") for text in texts)}
        return report_of(parts.values())

    def _part(self) -> Part:
        device: DeviceCounts = {}
        for key, count in self._device.counts.items():
            device.setdefault(replace(key, module=self._global_path(key.module)), DeviceCount()).add(count)
        rank = replace(
            self._rank,
            step_seconds=self.window.step_seconds,
            timeline=self.window.timeline,
            kinds=by_kind(device),
            network=self._network.counts,
        )
        return Part(self._run, rank, device)
