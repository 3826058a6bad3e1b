"""What runs on the ranks; imported once by the fork server."""

import contextlib
import datetime
import logging
import math
import os
import signal
import sys
import time
import warnings
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model

    from laboratory.emulator import Options
    from laboratory.emulator.driver import emulated
    from megatron_fc.checkpoints.integrity import refuse_corrupt
    from megatron_fc.cli.main import main
    from megatron_fc.connections import reference
    from megatron_fc.connections.kinds import is_connection_key
    from megatron_fc.errors import UserError
    from megatron_fc.evaluate.scoring import token_scores
    from megatron_fc.megatron.slots import NormSlot
    from megatron_fc.megatron.stream import widen
    from megatron_fc.planning.counts import DeviceCounts, NetworkCounts
    from megatron_fc.planning.network import Routing
    from megatron_fc.profiling.counters.device import DeviceCounter
    from megatron_fc.profiling.counters.network import NetworkCounter, gather_hosts
    from megatron_fc.profiling.counters.phase import Whereabouts
    from megatron_fc.profiling.groups import group_names
    from megatron_fc.profiling.own_loop import profile_loop
    from megatron_fc.profiling.records import Report
    from megatron_fc.resilience import rank_watch
    from megatron_fc.resilience.hang import StepClock
    from megatron_fc.resilience.rank_watch import RankWatch
    from support import tiny
    from support.layouts import ONE_RANK, Layout, Model, optimizers_of

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MICRO_BATCHES, BATCH, STEPS = 2, 2, 10


def on_rank(function: Callable[..., Any], rank: int, world: int, store: Path, args: tuple[Any, ...]) -> Any:
    """Join the world, run, leave."""
    logging.disable(logging.WARNING)  # Megatron lists every parameter of every model
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)})
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    get_write_results_queue("fork")  # Megatron would spawn its manager: five seconds for every rank that saves
    result = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return result


@dataclass
class Trained:
    """One model under one layout, as one rank saw it.

    Attributes:
        losses: by optimizer, mean loss of each step; nan on a rank that is not on the last pipeline stage.
        gradient: by parameter, the largest difference of its step-0 gradient to the reference's, relative to that
            gradient's largest value.
        squares: sums of squares of that difference and of the reference, over all parameters of this rank.
        recompute_exact: losses with full recompute are the same to the bit; None where it was not run.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)
    squares: tuple[float, float] = (0.0, 0.0)
    recompute_exact: bool | None = None


def train_all(layout: Layout, models: Sequence[Model], folder: Path) -> dict[str, Trained]:
    """Train every model from its stored start and compare with the stored reference; one rank makes both.

    Args:
        layout: one rank writes starts and reference gradients into `folder`, others read them.
        models: what to train.
        folder: shared by all layouts.
    """
    layout.initialise()
    results = {}
    for model in models:
        trained = Trained()
        optimizers = optimizers_of(layout, model)
        for optimizer in optimizers:
            run = Run(layout, model, folder / model.name, optimizer)
            run.accumulate(0)
            if optimizer == optimizers[0]:
                trained.gradient, trained.squares = run.compare_gradient()
            run.step()
            run.train(range(1, model.steps))
            trained.losses[optimizer] = run.losses
        if (
            layout != ONE_RANK
            and model.start == "random"
            and getattr(model.connection, "dynamic", True)
            and not model.bf16
        ):
            again = Run(layout, model, folder / model.name, optimizers[-1], RECOMPUTE).train(range(3))
            trained.recompute_exact = repr(again) == repr(run.losses[:3])  # nan included
        results[model.name] = trained
    return results


def command_line(words: Sequence[str]) -> int:
    """`megatron-fc` as a user calls it; returns the exit code."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        return main(words)
    except SystemExit as end:  # Megatron's way to end early
        return int(end.code or 0)


def hang(how: str, rank: int, files: str = "answer") -> None:
    """One rank sleeps or is stopped while the others wait for it in a collective.

    Args:
        how: "sleep", or "stop" for SIGSTOP.
        rank: the one that does.
        files: what those of the run do then: "answer"; "fail" or "block" where notes are written, "block the log".
    """
    mine, folder = torch.distributed.get_rank(), Path(sys.stderr.name).parent
    rank_watch._FILES_SECONDS, rank_watch._EXIT_SECONDS = 1.0, 2.0

    def on_end(_: str, notes: bool) -> str:
        if files == "fail":
            raise UserError("the tracker is torn")
        if files == "block":
            time.sleep(3600)
        if notes:
            (folder / f"noted{mine}").touch()
        return "do so"

    os.environ["MASTER_ADDR"] = "127.0.0.1"
    watch = RankWatch(_clock(seconds=4), "hang", on_end)
    watch.join()
    if files == "block the log":
        sys.__stderr__, sys.stderr = sys.stderr, _full_pipe()  # type: ignore[misc]
    try:
        if mine != rank:
            torch.distributed.barrier()
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(60)
    except Exception as error:
        raise watch.failed(error) from None


def _full_pipe() -> TextIO:
    """A file that never takes what is written to it."""
    _, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, bytes(1 << 16)):
            pass
    os.set_blocking(writing, True)
    return os.fdopen(writing, "w")


def step_slowly() -> None:
    """For longer than the limit."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    clock = _clock(seconds=2)
    watch = RankWatch(clock, "slow", lambda *_: "do so")
    watch.join()
    step = watch.around_forward_step(lambda: time.sleep(0.5))
    for _ in range(8):
        step()
    watch.end()


def _clock(seconds: float) -> StepClock:
    timeouts = {"distributed_timeout_minutes": seconds / 60 / 0.8, "distributed_timeout_seconds_after_init": None}
    return StepClock(Namespace(**timeouts))


def refusal_of(checkpoint: Path) -> str:
    """What this rank says of a checkpoint's content, "" if it is intact."""
    try:
        refuse_corrupt(checkpoint)
    except UserError as error:
        return str(error)
    return ""


def scores_of_shares(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `token_scores` says of logits over a vocabulary that all ranks share out."""
    world = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    return token_scores(logits.chunk(world, dim=1)[torch.distributed.get_rank()], tokens)


def write_start(model: Model, folder: Path) -> None:
    """Store a model's start, where `train_all` has not done so."""
    ONE_RANK.initialise()
    Run(ONE_RANK, model, folder / model.name, "sgd")


def write_reference(model: Model, folder: Path) -> None:
    """Store a model's start and the gradient of step 0."""
    first_step(ONE_RANK, model, folder)


def without_sequence_mark(layout: Layout, model: Model, folder: Path) -> dict[str, float]:
    """Negative control: the connections' gradients are left out of the reduction over tensor ranks."""
    layout.initialise()
    run = Run(layout, model, folder / model.name, "sgd")
    for _, name, parameter in run.named_parameters():
        if is_connection_key(name):
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
    run.accumulate(0)
    return run.compare_gradient()[0]


def first_step(layout: Layout, model: Model, folder: Path) -> tuple[float, dict[str, float]]:
    """Loss of step 0 and its gradient's differences to the reference's, parameter by parameter."""
    layout.initialise()
    run = Run(layout, model, folder / model.name, optimizers_of(layout, model)[0])
    run.accumulate(0)
    return run.losses[0], run.compare_gradient()[0]


def first_step_emulated(layout: Layout, model: Model, folder: Path) -> tuple[float, dict[str, float]]:
    """As `first_step`, with the kernels compiled and run in the emulator."""
    with emulated(90, Options(uninitialised="error")) as emulator:
        result = first_step(layout, model, folder)
    assert emulator.launches
    return result


def parameters_at_every_forward(
    layout: Layout, model: Model, folder: Path, bypass_call: bool = False
) -> tuple[list[float], list[int]]:
    """Train and return the losses, and a checksum of a site's parameters at each of its forward passes.

    Args:
        layout: data-parallel, with or without overlapped parameter gather.
        model: what to train.
        folder: where its start lies.
        bypass_call: negative control, the norm slot reads the parameters without calling the module that owns them.
    """
    layout.initialise()
    if bypass_call:
        NormSlot.forward = lambda self, h: self.norm(  # type: ignore[method-assign]
            reference.width(h, self.connection.site_parameters(), self.connection.config)
        )
    run = Run(layout, model, folder / model.name, "adam")
    checksums = []

    def record(norm: NormSlot, *_: Any) -> None:
        state = b"".join(p.detach().numpy().tobytes() for p in norm.connection.parameters())
        checksums.append(zlib.crc32(state))

    for chunk in run.chunks:
        for module in chunk.modules():
            if isinstance(module, NormSlot):
                module.register_forward_hook(record)
    return run.train(range(STEPS)), checksums


def train_and_save(layout: Layout, model: Model, folder: Path, path: Path, steps: int) -> list[float]:
    """Train from the stored start and write a checkpoint."""
    layout.initialise()
    run = Run(layout, model, folder / model.name, "adam")
    run.train(range(steps))
    if torch.distributed.get_rank() == 0:
        path.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(run.checkpoint(loading=False), str(path))
    return run.losses


def save_random(layout: Layout, models: dict[str, Model], folder: Path, settings: dict[str, Any]) -> None:
    """Write checkpoints of models all of whose parameters are random, by name, below `folder`.

    Args:
        layout: of the ranks.
        models: by name.
        folder: of the checkpoints.
        settings: arguments of the run that each claims to be of, besides those of norms.
    """
    layout.initialise()
    for name, model in models.items():
        sizes = layout if model.kind == "moe" else replace(layout, ep=1)
        chunk: Any = tiny.build(model.kind, model.connection, norms=model.norms, **sizes.options(), **model.options())
        for parameter_name, parameter in chunk.named_parameters():
            _draw(parameter_name, parameter)
        checkpoint = folder / name / "iter_0000001"
        if torch.distributed.get_rank() == 0:
            checkpoint.mkdir(parents=True)
            (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("1")
        torch.distributed.barrier()
        common = {"args": Namespace(**asdict(model.norms), **settings), "iteration": 1, "checkpoint_version": 3.0}
        dist_checkpointing.save({**common, "model": chunk.sharded_state_dict()}, str(checkpoint))


def _draw(name: str, parameter: torch.nn.Parameter) -> None:
    """Values of its own for every stage and every part of a divided parameter, the same for copies."""
    where = [parallel_state.get_pipeline_model_parallel_rank()]
    if ".experts." in name:
        where.append(parallel_state.get_expert_model_parallel_rank())
    elif getattr(parameter, "tensor_model_parallel", False):
        where.append(parallel_state.get_tensor_model_parallel_rank())
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {where}".encode()))
    with torch.no_grad():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def load_and_train(
    layout: Layout, model: Model, folder: Path, path: Path, steps: range, optimizer: bool
) -> list[float]:
    """Load a checkpoint of any layout and go on; the loss of a step is taken before its update."""
    layout.initialise()
    run = Run(layout, model, folder / model.name, "adam")
    run.load(path, optimizer)
    return run.train(steps)


@dataclass
class Counted:
    """Network traffic of one step, as one rank saw it.

    Attributes:
        counts: what was counted.
        routing: by MoE layer, counted from 0.
        padding_bytes: of gradients and of weights in the buffers of data parallelism that belong to no parameter.
        losses, plain_losses: of two steps, the second one counted, and of the same ones without a counter.
    """

    counts: NetworkCounts
    routing: dict[int, Routing]
    padding_bytes: tuple[int, int]
    losses: list[float]
    plain_losses: list[float]


def count_network(layout: Layout, model: Model, more: dict[str, Any]) -> Counted:
    """Count the second step; two nodes share the ranks."""
    layout.initialise()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    hosts = gather_hosts(f"node{2 * rank // world}")
    plain_losses = Run(layout, model, None, "adam", more).train(range(2))
    run = Run(layout, model, None, "adam", more)
    run.train(range(1))
    tokens: dict[int, torch.Tensor] = {}  # for every expert, by layer
    for chunk in run.chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(partial(_add_tokens, tokens))
    with Whereabouts(run.chunks) as where, NetworkCounter(where, group_names(), hosts) as counter:
        run.train(range(1, 2))
    buffers = [buffer for chunk in run.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return Counted(
        counts=counter.counts,
        routing={layer: _routing(count) for layer, count in sorted(tokens.items())},
        padding_bytes=(
            sum(_padding(buffer) * buffer.grad_dtype.itemsize for buffer in buffers),
            sum(_padding(buffer) * buffer.param_dtype.itemsize for buffer in buffers),
        ),
        losses=run.losses,
        plain_losses=plain_losses,
    )


@dataclass
class Profiled:
    """A loop of one's own without and with a profile of its second step, and that step counted by hand."""

    plain_losses: list[float]
    losses: list[float]
    device: DeviceCounts
    report: Report | None


def profile_own_loop(layout: Layout, model: Model, out: Path) -> Profiled:
    layout.initialise()
    by_hand = Run(layout, model, None, "adam", {})
    by_hand.train(range(1))
    with Whereabouts(by_hand.chunks) as where, DeviceCounter(where, "cpu") as counter:
        by_hand.train(range(1, 2))
    run = Run(layout, model, None, "adam", {})
    batch = {"micro_batch_size": BATCH, "global_batch_size": MICRO_BATCHES * BATCH}
    with profile_loop(run.chunks, out, sequence_length=tiny.SEQUENCE, **batch, from_step=1, steps=1) as profile:
        for step in range(2):
            profile.step()
            run.train(range(step, step + 1))
    return Profiled(by_hand.losses, run.losses, counter.counts, profile.report)


def _padding(buffer: Any) -> int:
    return int(buffer.numel - sum(parameter.numel() for parameter in buffer.params))


def _add_tokens(tokens: dict[int, torch.Tensor], router: Any, _: Any, output: tuple[Any, torch.Tensor]) -> None:
    # Recompute, which runs in backward, sends the same tokens once more.
    if torch._C._current_autograd_node() is None:
        layer = router.layer_number - 1
        tokens[layer] = tokens.get(layer, 0) + output[1].sum(0)


def _routing(tokens: torch.Tensor) -> Routing:
    group = parallel_state.get_expert_model_parallel_group()
    sent = tokens.reshape(group.size(), -1).sum(1)
    everyones = [torch.empty_like(sent) for _ in range(group.size())]
    torch.distributed.all_gather(everyones, sent, group=group)
    return Routing(sent.tolist(), [int(theirs[group.rank()]) for theirs in everyones])


class Run:
    """A model, its optimizer and its schedule on this rank."""

    def __init__(
        self, layout: Layout, model: Model, folder: Path | None, optimizer: str, more: dict[str, Any] | None = None
    ) -> None:
        """Without a folder the start is that of the seed, which layouts do not share."""
        self.layout, self.folder = layout, folder
        self.losses: list[float] = []
        options = {**layout.options(), **model.options(), **(more or {})}
        options["finalize_model_grads_func"] = finalize_model_grads
        stages = range(layout.vpp) if layout.vpp else [None]
        options |= {"tied": model.tied, "exchanges_shapes": layout.exchanges_shapes, "norms": model.norms}
        self.chunks = [tiny.build(model.kind, model.connection, vp_stage=stage, **options) for stage in stages]
        self.config = unwrap_model(self.chunks[0]).config
        if folder is not None:
            self._load_start(model)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap,
            overlap_param_gather=layout.overlap,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self.chunks)
        ]
        if not layout.exchanges_shapes:
            widen(self.chunks, model.connection)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=optimizer,
                lr=0.1 if optimizer == "sgd" else 3e-3,
                weight_decay=0.01,
                bf16=model.bf16,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
                overlap_param_gather=layout.overlap,
                clip_grad=1.0,
            ),
            self.chunks,
        )

    def sharded_state(self) -> dict[str, Any]:
        return {f"model{n}": unwrap_model(chunk).sharded_state_dict() for n, chunk in enumerate(self.chunks)}

    def named_parameters(self) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
        """Chunk, name and parameter of everything on this rank."""
        for number, chunk in enumerate(self.chunks):
            for name, parameter in unwrap_model(chunk).named_parameters():
                yield f"model{number}", name, parameter

    def checkpoint(self, loading: bool) -> dict[str, Any]:
        """Model and optimizer, as Megatron's sharded state."""
        state = self.sharded_state()
        return {**state, "optimizer": self.optimizer.sharded_state_dict(state, is_loading=loading)}

    def load(self, path: Path, optimizer: bool) -> None:
        state = dist_checkpointing.load(self.checkpoint(loading=True) if optimizer else self.sharded_state(), str(path))
        for number, chunk in enumerate(self.chunks):
            unwrap_model(chunk).load_state_dict(state[f"model{number}"])
        if optimizer:
            self.optimizer.load_state_dict(state["optimizer"])

    def train(self, steps: range) -> list[float]:
        """Run these steps and return all losses so far."""
        for step in steps:
            self.accumulate(step)
            self.step()
        return self.losses

    def accumulate(self, step: int) -> None:
        """Forward and backward of the step's micro-batches, gradients reduced."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        count = MICRO_BATCHES // size
        numbers = [number * size + rank for number in range(count)]
        batches = [[_batch(step, number) for number in numbers] for _ in self.chunks]
        iterators = [iter(batch) for batch in batches]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=count,
            seq_length=tiny.SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        total = torch.stack([output["loss"] for output in outputs]).sum(0) if outputs else torch.zeros(2)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.losses.append(float(total[0] / total[1]) if total[1] else math.nan)

    def step(self) -> None:
        assert self.optimizer.step()[0]

    def compare_gradient(self) -> tuple[dict[str, float], tuple[float, float]]:
        """Write the gradient as the reference on one rank, compare this rank's part of it elsewhere."""
        if self.layout.distributed_optimizer:
            self._gather_gradient()
        state = self.sharded_state()
        gradients = {id(parameter): parameter.main_grad for _, _, parameter in self.named_parameters()}
        tensors = [t for t in nested_values(state) if isinstance(t, (ShardedTensor, ShardedTensorFactory))]
        for tensor in tensors:
            main = gradients.get(id(tensor.data), tensor.data)
            tensor.data = main.float() if self.layout == ONE_RANK else torch.empty_like(main, dtype=torch.float32)
            if isinstance(tensor, ShardedTensor):
                tensor.dtype = torch.float32
        path = self.folder / "gradient"
        if self.layout == ONE_RANK:
            path.mkdir()
            dist_checkpointing.save(state, str(path))
            return {}, (0.0, 0.0)
        reference = dist_checkpointing.load(state, str(path))
        # A scalar's gradient sums over all tokens and may cancel to nearly nothing in one site: it is held against the
        # size that this kind of parameter has in the model.
        kinds: dict[str, float] = {}
        for chunk, name, _ in self.named_parameters():
            kind = _kind(name)
            kinds[kind] = max(kinds.get(kind, 1e-12), float(reference[chunk][name].abs().max()))
        differences, error, size = {}, 0.0, 0.0
        for chunk, name, parameter in self.named_parameters():
            expected = reference[chunk][name]
            difference = parameter.main_grad - expected
            scale = max(float(expected.abs().max()), 0.1 * kinds[_kind(name)])
            differences[name] = float(difference.abs().max()) / scale
            error, size = error + float(difference.square().sum()), size + float(expected.square().sum())
        return differences, (error, size)

    def _gather_gradient(self) -> None:
        """The distributed optimizer leaves each rank the sum of its own shard: put the shards together."""
        for chunk in self.chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)

    def _load_start(self, model: Model) -> None:
        path = self.folder / "start"
        if self.layout == ONE_RANK and not path.exists():
            if model.start == "random":
                _randomise(self.chunks)
            path.mkdir(parents=True)
            dist_checkpointing.save(self.sharded_state(), str(path))
        loaded = dist_checkpointing.load(self.sharded_state(), str(path))
        for number, chunk in enumerate(self.chunks):
            unwrap_model(chunk).load_state_dict(loaded[f"model{number}"])


def _kind(parameter: str) -> str:
    """Parameters of like size; the scalars of a learned leave, of which a model has one, go with those of its sites."""
    name = parameter.rpartition(".")[2]
    return "mapping_scale" if name == "leave_scale" else name


def _randomise(chunks: list[torch.nn.Module]) -> None:
    """Dense, non-symmetric connections far from the identity."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if is_connection_key(name):
                    size = 0.5 if parameter.dim() > 1 else 0.1
                    parameter += size * torch.randn(parameter.shape, generator=generator)


def _batch(step: int, number: int) -> dict[str, torch.Tensor]:
    """A micro-batch with something to learn: every second token follows from the one before."""
    tokens = tiny.tokens(seed=1000 * step + number, batch=BATCH)
    tokens[:, 1::2] = (3 * tokens[:, 0:-1:2] + 1) % tiny.VOCABULARY
    positions = torch.arange(tiny.SEQUENCE).expand(BATCH, -1)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": positions}


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    if parallel_state.get_context_parallel_world_size() > 1:
        group = parallel_state.get_context_parallel_group()
        batch = get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=group)
    mask = torch.ones(tiny.SEQUENCE, tiny.SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    return output, partial(_loss, batch["labels"].numel())


def _loss(count: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, tokens = output.float().sum(), torch.tensor(count, dtype=torch.int)
    return total, tokens, {"loss": torch.stack([total.detach(), tokens.float()])}
