"""The counter on every collective of torch.distributed, as rank 1 of four ranks on two nodes."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fc.errors import UserError
from megatron_fc.planning.counts import NetworkCount, NetworkCounts, NetworkKey
from megatron_fc.profiling.counters.network import OPERATORS, NetworkCounter
from megatron_fc.profiling.counters.phase import Whereabouts

HOSTS = ("left", "left", "right", "right")
RANK, WORLD = 1, 4


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    """Process groups whose operators are dispatched as ever and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()


class Calls(torch.nn.Module):
    """Its forward pass is the call."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call = call

    def forward(self) -> Any:
        return self.call()


def rows(count: int) -> torch.Tensor:
    """fp32 rows of 2 elements: 8 bytes each."""
    return torch.zeros(count, 2)


def count(call: Callable[[], object], names: dict[dist.ProcessGroup, str] | None = None) -> NetworkCounts:
    module = Calls(call)
    with Whereabouts(module) as where, NetworkCounter(where, names or {}, HOSTS) as counter:
        module()
    return counter.counts


# What is called; what it is called in reports; payload, bytes to the own node, bytes to the other one.
# Rank 1's next rank in the ring, 2, is on the other node.
CALLS: dict[str, tuple[Callable[[], object], str, int, int, int]] = {
    "all_reduce": (lambda: dist.all_reduce(rows(4)), "all_reduce", 32, 0, 48),
    "all_reduce of bf16": (lambda: dist.all_reduce(rows(4).bfloat16()), "all_reduce", 16, 0, 24),
    "all_gather_into_tensor": (lambda: dist.all_gather_into_tensor(rows(4), rows(1)), "all_gather", 32, 0, 24),
    "all_gather": (lambda: dist.all_gather([rows(1) for _ in HOSTS], rows(1)), "all_gather", 32, 0, 24),
    "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(rows(1), rows(4)), "reduce_scatter", 32, 0, 24),
    "reduce_scatter": (lambda: dist.reduce_scatter(rows(1), [rows(1) for _ in HOSTS]), "reduce_scatter", 32, 0, 24),
    "reduce_scatter of uneven parts": (
        lambda: dist.reduce_scatter(rows(2), [rows(1), rows(2), rows(3), rows(4)]),
        "reduce_scatter",
        80,
        0,
        64,
    ),
    "all_to_all_single": (lambda: dist.all_to_all_single(rows(4), rows(4)), "all_to_all", 24, 8, 16),
    "all_to_all_single of uneven parts": (
        lambda: dist.all_to_all_single(rows(4), rows(10), [1, 1, 1, 1], [1, 2, 3, 4]),
        "all_to_all",
        64,
        8,
        56,
    ),
    "all_to_all": (
        lambda: dist.all_to_all([rows(1) for _ in HOSTS], [rows(1), rows(2), rows(0), rows(4)]),
        "all_to_all",
        40,
        8,
        32,
    ),
    "broadcast": (lambda: dist.broadcast(rows(4), 0), "broadcast", 32, 0, 32),
    "broadcast to the last in the ring": (lambda: dist.broadcast(rows(4), 2), "broadcast", 32, 0, 0),
    "reduce": (lambda: dist.reduce(rows(4), 0), "reduce", 32, 0, 32),
    "reduce to this rank": (lambda: dist.reduce(rows(4), RANK), "reduce", 32, 0, 0),
    "gather": (lambda: dist.gather(rows(1), None, dst=0), "gather", 32, 8, 0),
    "gather to this rank": (lambda: dist.gather(rows(1), [rows(1) for _ in HOSTS], dst=RANK), "gather", 32, 0, 0),
    "scatter": (lambda: dist.scatter(rows(1), [rows(1) for _ in HOSTS], src=RANK), "scatter", 32, 8, 16),
    "scatter from another rank": (lambda: dist.scatter(rows(1), None, src=0), "scatter", 32, 0, 0),
    "send": (lambda: dist.send(rows(4), 3), "send", 32, 0, 32),
    "isend": (lambda: dist.isend(rows(4), 0), "send", 32, 32, 0),
    "irecv": (lambda: dist.irecv(rows(4), 0), "recv", 0, 0, 0),
    "recv": (lambda: dist.recv(rows(4), 0), "recv", 0, 0, 0),
    "barrier": (lambda: dist.barrier(), "barrier", 0, 0, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_bytes_of_one_call(name: str) -> None:
    call, collective, payload_bytes, intra_node_bytes, inter_node_bytes = CALLS[name]
    expected = NetworkCount(1, payload_bytes, intra_node_bytes, inter_node_bytes)
    assert count(call) == {NetworkKey("forward", "world", collective): expected}


def test_coalesced_calls_are_one() -> None:
    def reduce_two() -> None:
        with dist._coalescing_manager():
            dist.all_reduce(rows(4))
            dist.all_reduce(rows(2))

    def gather_two() -> None:
        with dist._coalescing_manager():
            dist.all_gather_into_tensor(rows(4), rows(1))
            dist.all_gather_into_tensor(rows(8), rows(2))

    def scatter_two() -> None:
        with dist._coalescing_manager():
            dist.reduce_scatter_tensor(rows(1), rows(4))
            dist.reduce_scatter_tensor(rows(2), rows(8))

    assert count(reduce_two) == {NetworkKey("forward", "world", "all_reduce"): NetworkCount(1, 48, 0, 72)}
    assert count(gather_two) == {NetworkKey("forward", "world", "all_gather"): NetworkCount(1, 96, 0, 72)}
    assert count(scatter_two) == {NetworkKey("forward", "world", "reduce_scatter"): NetworkCount(1, 96, 0, 72)}


def test_batched_sends_and_receives() -> None:
    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, rows(4), 2), dist.P2POp(dist.irecv, rows(4), 0)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    assert count(exchange) == {
        NetworkKey("forward", "world", "send"): NetworkCount(1, 32, 0, 32),
        NetworkKey("forward", "world", "recv"): NetworkCount(1, 0, 0, 0),
    }


def test_objects_travel_as_their_length_and_their_bytes() -> None:
    counts = count(lambda: dist.all_gather_object([None] * WORLD, {"layers": 16}))
    assert counts[NetworkKey("forward", "world", "all_gather")].calls == 2


def test_groups_are_named() -> None:
    tensor, alone, other = dist.new_group([0, 1]), dist.new_group([RANK]), dist.new_group([1, 3])

    def reduce_all() -> None:
        for group in (tensor, alone, other, None):
            dist.all_reduce(rows(4), group=group)

    counts = count(reduce_all, {tensor: "tp", alone: "pp"})
    assert counts == {
        NetworkKey("forward", "tp", "all_reduce"): NetworkCount(1, 32, 32, 0),
        NetworkKey("forward", "ranks 1,3", "all_reduce"): NetworkCount(1, 32, 0, 32),
        NetworkKey("forward", "world", "all_reduce"): NetworkCount(1, 32, 0, 48),
    }


def test_a_send_on_the_default_group_belongs_to_the_pair() -> None:
    pipeline = dist.new_group([1, 3])
    counts = count(lambda: dist.send(rows(4), 3), {pipeline: "pp"})
    assert counts == {NetworkKey("forward", "pp", "send"): NetworkCount(1, 32, 0, 32)}
    counts = count(lambda: dist.send(rows(4), 2), {pipeline: "pp"})
    assert counts == {NetworkKey("forward", "world", "send"): NetworkCount(1, 32, 0, 32)}


def test_backward_is_counted() -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):  # type: ignore[no-untyped-def]
            return tensor

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            dist.all_reduce(gradient)
            return gradient

    module = Calls(lambda: Sum.apply(rows(4).requires_grad_()).sum())
    with Whereabouts(module) as where, NetworkCounter(where, {}, HOSTS) as counter:
        module().backward()
    assert counter.counts == {NetworkKey("backward", "world", "all_reduce"): NetworkCount(1, 32, 0, 48)}


def test_threads_of_autograd_are_reached_and_those_of_python_are_not() -> None:
    threads = set()

    class Nested(torch.autograd.Function):
        """Calls for a backward pass within its own, which autograd hands to threads of its own when it is deep."""

        @staticmethod
        def forward(ctx, tensor, depth):  # type: ignore[no-untyped-def]
            ctx.depth = depth
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            threads.add(threading.get_ident())
            dist.all_reduce(rows(1))
            if ctx.depth > 0:
                with torch.enable_grad():
                    Nested.apply(rows(1).requires_grad_(), ctx.depth - 1).sum().backward()
            return gradient, None

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: dist.all_reduce(rows(1)))
        thread.start()
        thread.join()

    depth = 70
    deep = count(lambda: Nested.apply(rows(1).requires_grad_(), depth).sum().backward())
    assert len(threads) > 1
    assert sum(one.calls for one in deep.values()) == depth + 1
    assert count(elsewhere) == {}


def test_functional_collectives_are_refused() -> None:
    with pytest.raises(UserError, match="all_reduce"):
        count(lambda: functional.all_reduce(rows(4), "sum", dist.group.WORLD))


def test_every_operator_that_torch_has_is_known() -> None:
    schemas = torch._C._jit_get_all_schemas()
    assert {schema.name.removeprefix("c10d::") for schema in schemas if schema.name.startswith("c10d::")} == set(
        OPERATORS
    )
