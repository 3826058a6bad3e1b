"""Milliseconds of functions that take turns: called directly, and replayed from a CUDA graph where there are any.

On CUDA a measurement is one event before and one behind several calls in a row, for functions whose tensors exceed the
L2 cache by far, so that no call finds its data there. For smaller ones it is a single call, after another buffer has
gone through the cache. On other devices it is a single call by the host's clock.
"""

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

WARM_UP = 3  # calls, and rounds that do not count
CALLS = 5  # between two events on CUDA


@dataclass
class Times:
    """Of one function, milliseconds of a call, one value per round; `error` says why there are none.

    Attributes:
        direct: called from Python: what is waited for on the host counts.
        replayed: replayed from a CUDA graph; empty elsewhere, or where `graph_error` says why.
    """

    direct: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)
    error: str = ""
    graph_error: str = ""


def take_turns[Key: Hashable](
    functions: Mapping[Key, Callable[[], Any]], device: torch.device, rounds: int, stream_bytes: int
) -> dict[Key, Times]:
    """Time functions in rounds, each once per round, beginning with another one every round.

    `stream_bytes` is the size of their smallest streams.

    One stream serves all: warm-up, capture and measurement. Autograd then has no streams to join during capture, and
    kernels are compiled and loaded before it. A function that fails is left out from there on; the others go on.
    """
    times = {key: Times() for key in functions}
    if device.type != "cuda":
        calls = {key: {"direct": function} for key, function in functions.items()}
        _rounds(calls, times, _host_milliseconds, 0, rounds)
        return times
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = None if stream_bytes > 2 * cache else torch.empty(4 * cache, dtype=torch.uint8, device=device)
    calls = CALLS if flushed is None else 1
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs: dict[Key, dict[str, Callable[[], Any]]] = {}
        for key, function in functions.items():
            try:
                for _ in range(WARM_UP):
                    function()
                torch.cuda.synchronize()
            except Exception as error:
                times[key].error = said(error)
                continue
            runs[key] = {"direct": partial(_repeat, function, calls)}
            try:
                # All graphs share one pool: they run one after another, and nobody looks at what they return.
                runs[key]["replayed"] = _captured(runs[key]["direct"], stream, pool).replay
            except Exception as error:
                times[key].graph_error = said(error)
        _rounds(runs, times, lambda run: _event_milliseconds(run, flushed) / calls, WARM_UP, rounds)
    return times


def _repeat(function: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        function()


def _captured(run: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    gc.collect()  # what is freed during capture may break it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        run()
    return graph


def _rounds[Key: Hashable](
    runs: dict[Key, dict[str, Callable[[], Any]]],
    times: dict[Key, Times],
    milliseconds: Callable[[Callable[[], Any]], float],
    warm_up: int,
    rounds: int,
) -> None:
    for turn in range(warm_up + rounds):
        keys = list(runs)
        first = turn % len(keys) if keys else 0
        for key in keys[first:] + keys[:first]:
            try:
                for kind, run in runs[key].items():
                    spent = milliseconds(run)
                    if turn >= warm_up:
                        getattr(times[key], kind).append(spent)
            except Exception as error:
                times[key] = Times(error=said(error))
                del runs[key]


def _event_milliseconds(run: Callable[[], Any], flushed: torch.Tensor | None) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flushed is not None:
        flushed.zero_()  # written, not read: as much is still to go to memory before a call as after it
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def beyond(whole: list[float], part: list[float]) -> float | None:
    """Median over the rounds of what `whole` takes beyond `part`, None where one of them is missing."""
    return statistics.median(a - b for a, b in zip(whole, part, strict=True)) if whole and part else None


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def said(error: BaseException) -> str:
    """An exception in one line; of several on top of each other the first: a broken capture raises at its end too."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
