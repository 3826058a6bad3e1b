"""The phase and the module of a training step that the running operation belongs to."""

import sys
import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

from megatron_fc.planning.counts import Phase


class Place(NamedTuple):
    """What is running: `phase` as in `megatron_fc.planning.counts`, `module` the path of a module, "" for none."""

    phase: Phase
    module: str


class Whereabouts:
    """Knows, within its context, the phase and the module of whatever operation asks.

    ::

        with Whereabouts(model) as whereabouts, DeviceCounter(whereabouts) as counter:
            ...  # steps

    Forward: the innermost module that is being called. Backward: autograd numbers its nodes in the order in which a
    thread makes them, so the numbers at a module's entry and exit enclose its nodes; a sum that autograd makes where
    gradients meet belongs to the node that brought the last one, accumulation into a parameter to the owner of it.
    Recompute, of whatever kind, is known by what only a forward pass has in the middle of backward. Backward passes
    that are differentiated themselves (create_graph) look like recompute and are not told apart.

    The numbers of all modules are kept until the context ends: it is meant for a few steps.

    Args:
        model: a model, or the chunks of one. Paths are those of `named_modules` without the `module.` of wrappers
            such as DDP; those of several chunks begin with the chunk's number.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        self._paths: dict[nn.Module, str] = {}
        self._owners: dict[int, str] = {}  # of parameters, by id
        for number, chunk in enumerate(chunks):
            root = chunk
            while isinstance(getattr(root, "module", None), nn.Module):
                root = root.module  # type: ignore[assignment]
            for path, module in root.named_modules(prefix=str(number) if len(chunks) > 1 else ""):
                self._paths.setdefault(module, path)
                for parameter in module.parameters(recurse=False):
                    self._owners.setdefault(id(parameter), path)
        self._handles: list[RemovableHandle] = []
        self._threads: dict[int, _Thread] = {}
        self._makers: dict[int, int] = {}  # thread that made the graph, by number of the backward pass

    def __enter__(self) -> Self:
        self._home = threading.get_ident()
        for module in self._paths:
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def now(self) -> Place:
        """Where the calling thread is."""
        thread = self._thread(threading.get_ident())
        node = torch._C._current_autograd_node()
        if node is None:
            return Place("forward", thread.stack[-1]) if thread.stack else Place("optimizer", "")
        if thread.stack:
            return Place("recompute", thread.stack[-1])
        # Recompute of a function that is no module. Backward runs without gradients. So does the forward pass of an
        # autograd function, but that one also turns forward-mode gradients off, which backward leaves on.
        in_function = not torch._C._is_fwd_grad_enabled()
        again = torch.is_grad_enabled() or (in_function and not _applied_by_backward())
        return Place("recompute" if again else "backward", self._module_of(node))

    def _module_of(self, node: Any) -> str:
        variable = getattr(node, "variable", None)
        if variable is not None:  # accumulates into a parameter
            return self._owners.get(id(variable), "")
        return self._thread(self._maker()).module_of(node._sequence_nr())

    def _maker(self) -> int:
        """The thread that made the graph of the backward pass in which the calling thread is.

        On CPUs it is the thread that calls backward. CUDA's nodes run on a thread of the device: the graph was made
        outside, unless that very thread called for the pass from within another one, to go through what it recomputed.
        """
        backward = torch._C._current_graph_task_id()
        if backward not in self._makers:
            self._makers[backward] = threading.get_ident() if _called_for_here() else self._home
        return self._makers[backward]

    def _thread(self, ident: int) -> "_Thread":
        if ident not in self._threads:
            self._threads[ident] = _Thread()
        return self._threads[ident]

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._thread(threading.get_ident()).enter(self._paths[module])

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._thread(threading.get_ident()).leave()


class _Thread:
    """The modules that a thread is in, and from which number on its autograd nodes belong to which module."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self._numbers: list[int] = []
        self._modules: list[str] = []

    def enter(self, module: str) -> None:
        self.stack.append(module)
        self._mark()

    def leave(self) -> None:
        self.stack.pop()
        self._mark()

    def module_of(self, number: int) -> str:
        position = bisect_right(self._numbers, number) - 1
        return self._modules[position] if position >= 0 else ""

    def _mark(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._modules.append(self.stack[-1] if self.stack else "")


def _applied_by_backward() -> bool:
    """Whether backward of another function applied the one that now runs, as that of Megatron's all-to-all does."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not Function.apply.__func__.__code__:  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[assignment]
    caller = frame and frame.f_back
    return caller is not None and caller.f_back is not None and caller.f_back.f_code is BackwardCFunction.apply.__code__


def _called_for_here() -> bool:
    """Whether the calling thread waits for a backward pass that it called for."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _engine_run_backward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
