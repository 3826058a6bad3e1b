"""Profiles a recipe: a real training run in Megatron's loop, in which every rank counts for some steps, then stops."""

import functools
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch._dynamo

from megatron_fc.callbacks import Callback, ForwardStep
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.profiling.counters.network import gather_hosts
from megatron_fc.profiling.counting import Counting
from megatron_fc.profiling.records import Report, Run, check_same_but_connections, named
from megatron_fc.profiling.run_facts import layout, model_facts, origin
from megatron_fc.training import cpu_lane
from megatron_fc.training.loop import train
from megatron_fc.training.recipe import Recipe, load_recipe

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
    """Counts on one rank, as a callback of the training."""

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
        self._first, self._steps = first, steps
        self._counting: Counting | None = None

    def arguments_valid(self, args: Namespace) -> None:
        if args.cuda_graph_impl != "none":
            raise UserError(f"cuda_graph_impl={args.cuda_graph_impl}: replays cannot be counted, profile with none")

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        self._args = args
        hosts = gather_hosts()
        run = self._facts(parameters, hosts)
        check_same_but_connections([("this run", run), *named(self._against)])
        self._counting = Counting(run, chunks, hosts, self._out, self._nvtx)
        return chunks

    def before_step(self, iteration: int) -> None:
        # The step whose beginning closes the window is the loop's last, and the log counts to it.
        self._args.train_iters = min(self._args.train_iters, self._args.iteration + self._first + self._steps + 1)

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        @functools.wraps(forward_step)
        def timed(*args: Any, **options: Any) -> tuple[Any, Any]:
            assert self._counting is not None
            with self._counting.window.forward(self._args.curr_iteration - self._args.iteration) as watch_backward:
                output, loss = forward_step(*args, **options)
                watch_backward(output)
            return output, loss

        return timed

    def end(self) -> None:
        assert self._counting is not None
        if not self._counting.window.is_over:
            raise UserError(
                f"the run ended before step {self._first + self._steps} of this start: set --from-step or "
                f"--steps lower, or train_iters higher"
            )
        self.report = self._counting.gather()

    def failed(self, error: BaseException) -> BaseException:
        if self._counting is not None:
            self._counting.stop()
        return error

    def advice(self) -> str:
        return f"`megatron-fc traffic merge {self._out}` reports what was counted until then"

    def _facts(self, parameters: ParameterCount, hosts: Sequence[str]) -> Run:
        args, connection = self._args, self._recipe.connection
        return Run(
            connection=self._recipe.label,
            options=None if connection is None else {"kind": connection.kind, **connection.to_dict()},
            backend=self._recipe.backend,
            model={"family": self._recipe.family, **model_facts(args)},
            layout=layout(args, hosts),
            # Layers of a hybrid model are sub-layers.
            layers=args.num_layers // 2 if self._recipe.family == "hybrid" else args.num_layers,
            tokens_per_step=args.global_batch_size * args.seq_length,
            from_step=self._first,
            steps=self._steps,
            parameters=parameters.total,
            command=self._command,
            **origin(),
        )
