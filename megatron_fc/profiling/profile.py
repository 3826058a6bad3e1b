"""Profiles a recipe: a real training run in Megatron's loop, in which every rank counts for some steps, then stops."""

import functools
import shlex
import socket
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from megatron_fc.callbacks import Callback, ForwardStep
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.planning.counts import DeviceCount, DeviceCounts
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.kernel_times import KernelTimes, copy_bytes_per_second
from megatron_fc.profiling.counters.network import NetworkCounter, gather_hosts
from megatron_fc.profiling.counters.nsight import NsightRanges
from megatron_fc.profiling.counters.phase import Whereabouts
from megatron_fc.profiling.counters.window import Window
from megatron_fc.profiling.files import clear, dump_part, parse_part, read_parts, write_part
from megatron_fc.profiling.gather import Gatherer, make_gatherer
from megatron_fc.profiling.groups import group_names
from megatron_fc.profiling.kinds import by_kind
from megatron_fc.profiling.records import Part, Rank, Report, Run, check_same_but_connections, named, report_of
from megatron_fc.profiling.run_facts import coordinates, layout, model_facts, paths_in_whole_model
from megatron_fc.runs.summary import git_commit, package_versions
from megatron_fc.training import cpu_lane
from megatron_fc.training.loop import train
from megatron_fc.training.recipe import Recipe, load_recipe

_GATHERING = timedelta(seconds=60)
# A profile is no training: it leaves no checkpoint and validates nothing, unless overrides say so.
_DEFAULTS = ("save_interval=null", "eval_iters=0")


def profile(
    config: Path,
    overrides: Sequence[str],
    first: int,
    steps: int,
    out: Path,
    command: Sequence[str],
    nvtx: bool = False,
    callbacks: Sequence[Callback] = (),
    against: Sequence[Report] = (),
) -> Report | None:
    """Train, count on steps `first` to `first + steps - 1`, stop; every rank calls it.

    Args:
        config, overrides: as for training.
        first: number of the first counted step, from 0.
        steps: how many.
        out: folder of the report, of the parts that ranks leave there as they go, and of the run itself.
        command: how the program was called, for the report.
        nvtx: mark ranges for Nsight, and start and stop its capture, instead of timing kernels by torch's profiler.
        callbacks: go along with the training, and are counted.
        against: reports that this one is to stand beside.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: a value is wrong, the run differs from those in more than connections, or it is too short for the
            window.
    """
    if first < 0 or steps < 1:
        raise UserError(f"--from-step {first} --steps {steps}: count from step 0 on, one step at least")
    if nvtx and cpu_lane.needed():
        raise UserError("--nvtx is for nsys and ncu, which need a CUDA device: torch sees none")
    recipe = load_recipe(config, [*_DEFAULTS, *overrides, f"run_dir={out}"])
    profiler = _Profiler(recipe, first, steps, out, shlex.join(["megatron-fc", *command]), nvtx, against)
    # While dispatch modes are active torch runs no compiled function: so that all steps are alike, none does.
    with torch._dynamo.config.patch(disable=True):
        train(recipe, [*callbacks, profiler])
    return profiler.report


class _Profiler(Callback):
    """Counts on one rank: a callback of the training and an `Observer` of the window."""

    def __init__(
        self,
        recipe: Recipe,
        first: int,
        steps: int,
        out: Path,
        command: str,
        nvtx: bool,
        against: Sequence[Report],
    ) -> None:
        self._against = against
        self.report: Report | None = None
        self._recipe, self._out, self._command, self._nvtx = recipe, out, command, nvtx
        self._window = Window(first, steps, self)
        self._first, self._steps = first, steps
        self._contexts = ExitStack()
        self._kernels: KernelTimes | None = None

    # --- a callback ---

    def arguments_valid(self, args: Namespace) -> None:
        if args.cuda_graph_impl != "none":
            raise UserError(f"cuda_graph_impl={args.cuda_graph_impl}: replays cannot be counted, profile with none")

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        self._args, self._chunks = args, chunks
        self._hosts = gather_hosts()
        self._gatherer: Gatherer = make_gatherer(_GATHERING)
        self._global_path = paths_in_whole_model(chunks)
        self._run = self._facts(parameters)
        check_same_but_connections([("this run", self._run), *named(self._against)])
        rank = torch.distributed.get_rank()
        self._rank = Rank(rank, socket.gethostname(), coordinates())
        if rank == 0:
            clear(self._out)
        return chunks

    def before_step(self, iteration: int) -> None:
        # The step whose beginning closes the window is the loop's last, and the log counts to it.
        self._args.train_iters = min(self._args.train_iters, self._args.iteration + self._first + self._steps + 1)

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        @functools.wraps(forward_step)
        def timed(*args: Any, **options: Any) -> tuple[Any, Any]:
            with self._window.forward(self._args.curr_iteration - self._args.iteration) as watch_backward:
                output, loss = forward_step(*args, **options)
                watch_backward(output)
            return output, loss

        return timed

    def end(self) -> None:
        if not self._window.is_over:
            raise UserError(
                f"the run ended before step {self._first + self._steps} of this start: set --from-step or "
                f"--steps lower, or train_iters higher"
            )
        texts = self._gatherer.gather(dump_part(self._part()))
        if self._rank.rank == 0:
            parts = {part.rank.rank: part for part in read_parts(self._out)}
            parts |= {part.rank.rank: part for part in (parse_part(text, "a gathered part") for text in texts)}
            self.report = report_of(parts.values())

    def failed(self, error: BaseException) -> BaseException:
        self._contexts.close()
        return error

    def advice(self) -> str:
        return f"`megatron-fc traffic merge {self._out}` reports what was counted until then"

    # --- an Observer ---

    def begin_counting(self) -> None:
        enter = self._contexts.enter_context
        whereabouts = enter(Whereabouts(self._chunks))
        if (
            not cpu_lane.needed() and not self._nvtx
        ):  # Nsight and torch's profiler cannot both have the device's counters
            self._rank.copy_bytes_per_second = copy_bytes_per_second()
            self._kernels = enter(KernelTimes(whereabouts))
        if self._nvtx:
            enter(NsightRanges(whereabouts, self._global_path))
        self._network = enter(NetworkCounter(whereabouts, group_names(), self._hosts))
        self._device = enter(DeviceCounter(whereabouts, "cpu" if cpu_lane.needed() else "cuda"))

    def step_counted(self) -> None:
        write_part(self._out, self._part())

    def end_counting(self) -> None:
        self._contexts.close()
        if self._kernels is not None:
            for key, seconds in self._kernels.seconds().items():
                if key in self._device.counts:
                    self._device.counts[key].seconds = seconds
            write_part(self._out, self._part())

    def _part(self) -> Part:
        device: DeviceCounts = {}
        for key, count in self._device.counts.items():
            device.setdefault(replace(key, module=self._global_path(key.module)), DeviceCount()).add(count)
        rank = replace(
            self._rank,
            step_seconds=self._window.step_seconds,
            timeline=self._window.timeline,
            kinds=by_kind(device),
            network=self._network.counts,
        )
        return Part(self._run, rank, device)

    def _facts(self, parameters: ParameterCount) -> Run:
        args, connection = self._args, self._recipe.connection
        date = [datetime.now(UTC).isoformat(timespec="seconds")]
        torch.distributed.broadcast_object_list(date, src=0)
        return Run(
            connection=self._recipe.label,
            options=None if connection is None else {"kind": connection.kind, **connection.to_dict()},
            backend=self._recipe.backend,
            model={"family": self._recipe.family, **model_facts(args)},
            layout=layout(args, self._hosts),
            # Layers of a hybrid model are sub-layers.
            layers=args.num_layers // 2 if self._recipe.family == "hybrid" else args.num_layers,
            tokens_per_step=args.global_batch_size * args.seq_length,
            from_step=self._first,
            steps=self._steps,
            parameters=parameters.total,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            command=self._command,
            date=date[0],
            versions=package_versions(),
            git_commit=git_commit(),
        )
