"""The CPU lane: lets the real Megatron run without a GPU, over gloo.

Megatron assumes CUDA in some sixty places: literal device="cuda", streams, CUDA random states. `install` redirects
these to the CPU, in torch and in the few Megatron functions listed below, for the running process. Nothing else
changes: models, schedules, optimizers and checkpoints are Megatron's own code, which is what makes this lane worth
testing on. It is installed only where torch finds no CUDA device.
"""

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA = torch.Tensor.cuda
_TO = torch.Tensor.to
_TYPE = torch.Tensor.type
_PIN = torch.Tensor.pin_memory
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_REDIRECTED = frozenset({_CUDA, _TO, _TYPE, _PIN, _IS_CUDA})
_installed = False


def needed() -> bool:
    """True where there is no CUDA device."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Redirect CUDA to the CPU in this process, where there is no CUDA device; True if the lane is active.

    Call it before Megatron is imported: what it sets for torch.compile is read on import.
    """
    global _installed
    if _installed or not needed():
        return _installed
    _installed = True
    # torch.compile would need a C++ toolchain, and compiling takes longer than these small models run.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron demands it under sequence parallelism, whatever the device.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _redirect_devices()
    _replace_runtime()
    _replace_random_states()
    _adapt_megatron_core()
    _adapt_checkpoint_worker()
    _adapt_half_precision_optimizer()
    _adapt_megatron_training()
    return True


class _CudaIsCpu(TorchFunctionMode):
    """Every torch call that names a CUDA device is made on the CPU instead."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every torch call passes here, thousands in a step of even a tiny model: the common one has to be cheap.
        if not kwargs and func not in _REDIRECTED:
            return func(*args)
        kwargs = dict(kwargs or {})
        if func is _CUDA or func is _PIN:
            return args[0]
        if func == _IS_CUDA:
            return True  # the MoE dispatcher reads split sizes on the host only from CUDA tensors
        if func is _TYPE and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # optimizers sort parameters by this name
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is _TO and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    if isinstance(device, bool):
        return device
    names_cuda = (
        isinstance(device, int)
        or (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
    )
    return _CPU if names_cuda else device


def _redirect_devices() -> None:
    mode = _CudaIsCpu()
    mode.__enter__()
    # backward() is itself overridable and therefore runs with the mode popped; recompute runs forward code in it.
    autograd: Any = torch.autograd
    engine = autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return engine(*args, **kwargs)

    autograd._engine_run_backward = run_backward


class _Stream:
    """A stream or an event of a device on which everything is synchronous."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, *_: Any) -> "_Stream":
        return _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def fork_checkpoint_helper() -> None:
    """Start the helper that hands on what checkpoint writers report; call it before there are threads and connections.

    Megatron spawns it at the first checkpoint, five seconds in which it imports everything anew: a process with a CUDA
    context must not be forked.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue("fork")


def _replace_runtime() -> None:
    """Device identity, streams and memory statistics. `is_available` stays False: torch itself relies on it."""
    properties = types.SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1)
    stream = _Stream()
    memory = dict.fromkeys(
        (
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "max_memory_reserved",
        ),
        lambda *_: 0,
    )
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "set_stream": lambda *_: None,
        "stream": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        **memory,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


def _replace_random_states() -> None:
    """The CUDA generator is the CPU generator."""

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    cuda: Any = torch.cuda
    cuda.manual_seed = cuda.manual_seed_all = seed
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state

    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _adapt_megatron_core() -> None:
    import megatron.core.models.hybrid.hybrid_block as hybrid_block
    import megatron.core.tensor_parallel.random as random
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # torch's norm refuses sequence parallelism only because it does not mark its parameters for Megatron's
    # reduction of their gradients: mark them.
    build = WrappedTorchNorm.__new__

    def build_norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = build(cls, config, hidden_size, eps, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_norm

    if not random.HAVE_TE:
        hybrid_block.TENorm = WrappedTorchNorm  # the final norm of a hybrid stack is hard-coded

        # Without TE, fp8=False is taken for "an fp8 recipe is given" and TE is called.
        checkpoint_init = random.CheckpointWithoutOutput.__init__

        def init(self: Any, fp8: Any = False, *args: Any, **kwargs: Any) -> None:
            checkpoint_init(self, fp8 or None, *args, **kwargs)

        random.CheckpointWithoutOutput.__init__ = init

    # The overlapped pipeline schedule frees a buffer right after isend. On CUDA the stream order protects it, gloo
    # would read freed memory: an alias keeps the storage until the send is done.
    isend = torch.distributed.isend

    def safe_isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return isend(tensor.detach(), *args, **kwargs)

    torch.distributed.isend = torch.distributed.distributed_c10d.isend = safe_isend  # batches of sends know the second


def _adapt_checkpoint_worker() -> None:
    """Let the process that writes checkpoints while training goes on do without a device, too."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop = staticmethod(_write_checkpoints)


def _write_checkpoints(*args: Any, **options: Any) -> None:
    """Megatron's loop of the worker, which lives in a process of its own."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    _replace_runtime()
    preload = FileSystemWriterAsync.preload_tensors

    def preload_copies(write_buckets: Any, non_blocking: bool = True) -> Any:
        # The worker copies from the device while the rank waits. These tensors are on the CPU, and shared: the rank
        # would go on training what is being written.
        return [
            (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (data, tensors) in preload(write_buckets, non_blocking)
        ]

    FileSystemWriterAsync.preload_tensors = staticmethod(preload_copies)
    PersistentAsyncCaller.async_loop(*args, **options)


def _adapt_half_precision_optimizer() -> None:
    """Let the half-precision optimizer save and load a model that has fp32 parameters too.

    Its sharded state numbers the half-precision parameters alone, while torch's optimizer numbers all: with the fp32
    parameters of Frac-Connections it fails at the first checkpoint. On GPUs the distributed optimizer does it right
    (`megatron_fc.megatron.refusals` asks for it); it cannot resume without TE or Apex, so not here. During both calls
    every parameter is listed as if it had a main copy, an fp32 parameter being its own.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Optimizer

    @contextlib.contextmanager
    def all_listed(optimizer: Any) -> Iterator[None]:
        model_groups, main_groups = optimizer.float16_groups, optimizer.fp32_from_float16_groups
        model_of = {
            id(main): model
            for mains, models in zip(main_groups, model_groups, strict=True)
            for main, model in zip(mains, models, strict=True)
        }
        torch_groups = [group["params"] for group in optimizer.optimizer.param_groups]
        optimizer.float16_groups = [[model_of.get(id(p), p) for p in group] for group in torch_groups]
        optimizer.fp32_from_float16_groups = torch_groups
        try:
            yield
        finally:
            optimizer.float16_groups, optimizer.fp32_from_float16_groups = model_groups, main_groups

    sharded_state_dict, load_state_dict = Optimizer.sharded_state_dict, Optimizer.load_state_dict

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        with all_listed(self):
            return sharded_state_dict(self, *args, **kwargs)

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        with all_listed(self):
            return load_state_dict(self, *args, **kwargs)

    Optimizer.sharded_state_dict, Optimizer.load_state_dict = save, load


def _adapt_megatron_training() -> None:
    import megatron.core.datasets.utils as dataset_utils
    import megatron.training.training as training

    initialize = training.initialize_megatron

    def initialize_without_cuda(*args: Any, **kwargs: Any) -> Any:
        return initialize(*args, **{**kwargs, "allow_no_cuda": True})

    training.initialize_megatron = initialize_without_cuda
    # The wheel ships the compiled helpers without the Makefile that Megatron would run.
    dataset_utils.compile_helpers = lambda: None
