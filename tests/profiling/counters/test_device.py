"""The counter of device memory: rules for operations, and a training of a real Megatron model under it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import setitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fc import FracConfig
from megatron_fc.planning.counts import DeviceCounts, total_device
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.operations import NOTHING, moved
from megatron_fc.profiling.counters.phase import Whereabouts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    import rank
    from support import tiny

ROW = 4 * 8  # bytes


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with rank.one_rank():
        yield


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[DeviceCounts]:
    with Whereabouts(model) as whereabouts, DeviceCounter(whereabouts) as counter:
        yield counter.counts


def rows(run: Callable[[], object]) -> tuple[float, float]:
    """Rows of 8 fp32 numbers read and written."""
    with counting(nn.Identity()) as counts:
        run()
    total = total_device(counts.values())
    return total.read_bytes / ROW, total.written_bytes / ROW


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Rows read and written, for a and b [4, 8] and i, four int64, which are a row themselves.
RULES: list[tuple[float, float, Callable[[Tensor, Tensor, Tensor], Any]]] = [
    (8, 4, lambda a, b, i: a + b),
    (4, 4, lambda a, b, i: a * a),  # the same tensor is read once
    (8, 8, lambda a, b, i: torch.cat((a, b))),
    (4, 4, lambda a, b, i: torch.cat((a[:2], a[2:]))),
    (4, 8, lambda a, b, i: torch.mm(a.view(8, 4), a.view(8, 4).t())),  # so are views of one another
    (1, 4, lambda a, b, i: b[:1].expand(4, -1).exp()),  # what is expanded has its real elements
    (0, 0, lambda a, b, i: a.view(2, 16).transpose(0, 1).unsqueeze(0)[:, :2].detach()),
    (0, 0, lambda a, b, i: torch.ops.aten._unsafe_view(a, (16, 2))),
    (0, 0, lambda a, b, i: (torch.empty_like(a), a.new_empty(9), a.t_())),
    (0, 4, lambda a, b, i: torch.zeros_like(a)),
    (0, 4, lambda a, b, i: a.zero_()),
    (4, 4, lambda a, b, i: a.copy_(b)),
    (8, 4, lambda a, b, i: a.add_(b)),
    (8, 4, lambda a, b, i: torch.add(a, b, out=torch.empty_like(a))),
    (8, 8, lambda a, b, i: torch._foreach_exp([a, b])),
    (8, 8, lambda a, b, i: torch._foreach_mul_([a, b], 2.0)),
    (5, 4, lambda a, b, i: F.embedding(i, a)),
    (5, 4, lambda a, b, i: a[i]),
    (1.5, 0.5, lambda a, b, i: a.view(-1).gather(0, i)),
    (5, 4, lambda a, b, i: a.index_copy_(0, i, b)),
    (9, 4, lambda a, b, i: a.index_add_(0, i, b)),
    (5, 4, lambda a, b, i: a.index_put_((i,), b)),
    (9, 4, lambda a, b, i: a.index_put_((i,), b, accumulate=True)),
    (0.875, 3, lambda a, b, i: a.index_put_((i[:3],), b[0, 0])),  # a number for all that is indexed
    (1.5, 2, lambda a, b, i: a.index_put_((i[:2],), b[0])),
    (1.5, 0.5, lambda a, b, i: a.index_put_((i, i), b[0, :4])),
    (5.125, 4.125, lambda a, b, i: a.index_put_((i < 2,), b[0, 0])),  # to torch masked_fill_; i < 2 is (1, 0.125)
    (2, 0.5, lambda a, b, i: a.view(-1).scatter_add_(0, i, b[0, :4])),
    (5, 2, lambda a, b, i: F.embedding_bag(i, a, i[:2], mode="sum")),
    (8, 4.5, lambda a, b, i: ATTENTION(*(t.view(1, 1, 4, 8) for t in (a, b, a)))),  # and a number per row
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("read", "written", "run"), RULES)
def test_rules(device: str, read: float, written: float, run: Callable[..., object]) -> None:
    a, b = torch.ones(4, 8, device=device), torch.ones(4, 8, device=device)
    numbers = torch.arange(4, device=device)
    assert rows(lambda: run(a, b, numbers)) == (read, written)


def test_a_mask_writes_where_it_is_true() -> None:
    a, row, mask = torch.ones(4, 8), torch.ones(8), torch.tensor([True, False, True, True])
    assert rows(lambda: a.index_put_((mask,), row)) == (1 + 4 / ROW, 3)
    columns, values = torch.arange(8) < 2, torch.ones(4, 2)
    assert rows(lambda: setitem(a, (slice(None), columns), values)) == (1 + 8 / ROW, 1)


def test_a_note_to_the_allocator_moves_nothing() -> None:
    a = torch.ones(4, 8)
    assert moved(torch.ops.aten.record_stream.default, (a, None), {}, None, "cpu") == NOTHING


def test_memory_of_other_devices_does_not_count() -> None:
    """The host's in a run on CUDA; here the meta device is the run's."""
    host, here = torch.ones(4, 8), torch.ones(4, 8, device="meta")

    def counted(run: Callable[[], object]) -> tuple[float, float]:
        with Whereabouts(nn.Identity()) as whereabouts, DeviceCounter(whereabouts, "meta") as counter:
            run()
        total = total_device(counter.counts.values())
        return total.read_bytes / ROW, total.written_bytes / ROW

    assert counted(lambda: here + here) == (4, 4)
    assert counted(lambda: host.add_(host)) == (0, 0)
    assert counted(lambda: host[torch.arange(2)]) == (0, 0)
    assert counted(lambda: here.copy_(host)) == counted(lambda: host.to("meta")) == (0, 4)


def training(frac: FracConfig | None, counter: Any, **options: Any) -> tuple[list[float], Any]:
    """Losses of three steps of a tiny MoE, and what the counter has."""
    model = tiny.build("moe", frac, **options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    with counter(model) as counts:
        for step in range(3):
            loss = tiny.loss(model, tiny.tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, counts


def no_counter(model: nn.Module) -> Any:
    return contextlib.nullcontext()


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("frac", [None, FracConfig(rate=4), FracConfig(rate=2, recompute=True)])
@pytest.mark.parametrize("options", [{}, RECOMPUTE])
def test_training_does_not_change(frac: FracConfig | None, options: dict[str, Any]) -> None:
    tiny.seed_dropout(3)
    plain, _ = training(frac, no_counter, **options)
    losses, counts = training(frac, counting, **options)
    assert losses == plain
    assert {key.phase for key in counts} >= {"forward", "backward", "optimizer"}


def in_layers(counts: DeviceCounts, phase: str) -> DeviceCounts:
    return {
        replace(key, phase="forward"): count
        for key, count in counts.items()
        if key.phase == phase and key.module.startswith("decoder.layers") and "router" not in key.module
    }


def test_recompute_moves_what_forward_moved() -> None:
    """Full recompute runs each layer's forward pass once more and changes nothing about its backward pass."""
    for frac in (None, FracConfig(rate=4)):
        _, without = training(frac, counting)
        _, with_recompute = training(frac, counting, **RECOMPUTE)
        assert not in_layers(without, "recompute")
        forward = in_layers(with_recompute, "forward")
        assert forward == in_layers(with_recompute, "recompute") == in_layers(without, "forward")
        assert in_layers(with_recompute, "backward") == in_layers(without, "backward")
