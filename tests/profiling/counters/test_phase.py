"""Phase and module of operations, forward, backward and in recompute, on more than one thread too."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_fc.profiling.counters.phase import Place, Whereabouts


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 2


class Swap(torch.autograd.Function):
    """Applies itself in backward, as Megatron's all-to-all does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return Swap.apply(g)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(x).sin()


class Block(nn.Module):
    """A linear layer, an autograd function and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.doubled = Doubled()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.doubled(self.linear(x))


class Model(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


class Log(TorchDispatchMode):
    """Every operation that computes, with the place where it ran."""

    def __init__(self, whereabouts: Whereabouts) -> None:
        super().__init__()
        self.seen: list[tuple[str, Place]] = []
        self.whereabouts = whereabouts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen.append((func.overloadpacket.__name__, self.whereabouts.now()))
        return func(*args, **(kwargs or {}))

    def places(self, op: str, phase: str) -> list[str]:
        return [place.module for name, place in self.seen if name == op and place.phase == phase]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, requires_grad=True)


LINEARS = ["blocks.0.linear", "blocks.1.linear"]
DOUBLED = ["blocks.0.doubled", "blocks.1.doubled"]


def test_forward_backward_and_what_is_neither(x: Tensor) -> None:
    model = Model()
    with Whereabouts(model) as whereabouts, Log(whereabouts) as log:
        loss = model(x).mul(3).sum()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
    assert log.places("addmm", "forward") == LINEARS
    assert log.places("sin", "forward") == log.places("cos", "backward")[::-1] == DOUBLED
    assert log.places("mul", "forward") == DOUBLED  # inside of the autograd function
    assert log.places("mul", "optimizer") == [""]  # the loss, outside of the model
    assert log.places("mm", "backward") == [name for name in LINEARS[::-1] for _ in range(2)]
    assert log.places("mul", "backward") == ["", *(name for name in DOUBLED[::-1] for _ in range(2))]
    assert log.places("add", "backward") == LINEARS[::-1]  # autograd's sum, of the node that brought the last gradient
    assert log.places("sub_", "optimizer") == [""] * 4
    assert not [place for _, place in log.seen if place.phase == "recompute"]


def test_function_that_backward_applies_is_no_recompute(x: Tensor) -> None:
    model = Model(lambda block, x: Swap.apply(block(x)))
    with Whereabouts(model) as whereabouts, Log(whereabouts) as log:
        model(x).sum().backward()
    assert len(log.places("flip", "forward")) == len(log.places("flip", "backward")) == 2
    assert not [place for _, place in log.seen if place.phase == "recompute"]


def test_accumulation_belongs_to_the_owner_of_the_parameter(x: Tensor) -> None:
    model = Model()
    with Whereabouts(model) as whereabouts, Log(whereabouts) as log:
        for _ in range(2):
            model(x.detach()).sum().backward()
    assert sorted(log.places("add_", "backward")) == sorted(LINEARS * 2)


@pytest.mark.parametrize("run", [reentrant, not_reentrant])
def test_recompute_is_told_apart(x: Tensor, run: Any) -> None:
    model = Model(run)
    with Whereabouts(model) as whereabouts, Log(whereabouts) as log:
        model(x).sum().backward()
    assert log.places("addmm", "forward") == log.places("addmm", "recompute")[::-1] == LINEARS
    assert log.places("sin", "forward") == DOUBLED
    assert log.places("mul", "recompute") == DOUBLED[::-1]
    assert log.places("cos", "backward") == DOUBLED[::-1]
    assert log.places("mm", "backward") == [name for name in LINEARS[::-1] for _ in range(2)]
    assert log.places("mm", "recompute") == []


def test_recompute_of_what_is_no_module(x: Tensor) -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: Double.apply(x).sin(), x, use_reentrant=False)

    model = nn.Sequential(Functional(), nn.Linear(4, 4))
    with Whereabouts(model) as whereabouts, Log(whereabouts) as log:
        model(x).sum().backward()
    assert log.places("mul", "forward") == log.places("mul", "recompute") == ["0"]
    assert log.places("mul", "backward") == ["0", "0"]


@pytest.mark.parametrize("run", [Model().run, reentrant])
def test_backward_on_a_thread_of_the_device(x: Tensor, run: Any) -> None:
    """As CUDA does: another thread with its own numbers runs the nodes, and recompute's pass within it."""
    model = Model(run)
    with Whereabouts(model) as whereabouts:
        torch.randn(1, requires_grad=True).sin().cos()  # so that the numbers of the threads differ
        loss, one = model(x).sum(), torch.ones(())
        log = Log(whereabouts)

        def of_the_device() -> None:
            with log:
                Variable._execution_engine.run_backward((loss,), (one,), False, False, (), True, True)

        thread = threading.Thread(target=of_the_device)
        thread.start()
        thread.join()
    assert log.places("cos", "backward") == DOUBLED[::-1]
    assert log.places("mm", "backward") == [name for name in LINEARS[::-1] for _ in range(2)]
    assert log.places("addmm", "recompute") == (LINEARS[::-1] if run is reentrant else [])


def test_chunks_and_wrappers(x: Tensor) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    chunks = [Wrapper(Wrapper(Block())), Wrapper(Block())]
    with Whereabouts(chunks) as whereabouts, Log(whereabouts) as log:
        chunks[1](chunks[0](x)).sum().backward()
    assert log.places("addmm", "forward") == ["0.linear", "1.linear"]
    assert log.places("cos", "backward") == ["1.doubled", "0.doubled"]


def test_hooks_go_and_a_failing_module_is_left(x: Tensor) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("as asked for")

    model = nn.Sequential(Block(), Fails())
    with Whereabouts(model) as whereabouts:
        with pytest.raises(RuntimeError, match="as asked for"):
            model(x)
        assert whereabouts.now() == Place("optimizer", "")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
