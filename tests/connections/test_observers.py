"""Hooks of people are told from those of torch and Megatron."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from torch.nn.modules import module as torch_module

from megatron_fc.connections.observers import observed


def hook(*_: Any) -> None: ...


class Hooks:
    def method(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


KINDS = [
    nn.Module.register_forward_hook,
    nn.Module.register_forward_pre_hook,
    nn.Module.register_full_backward_hook,
    nn.Module.register_full_backward_pre_hook,
]


@pytest.mark.parametrize("register", KINDS)
@pytest.mark.parametrize("one", [hook, lambda *_: None, partial(partial(hook), 1), Hooks().method, Hooks()])
def test_a_hook_observes_while_it_is_there(register: Callable[..., Any], one: Any) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not observed(first, second)
    handle = register(second, one)
    assert observed(first, second)
    assert not observed(first)
    handle.remove()
    assert not observed(first, second)


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
    ],
)
def test_a_global_hook_observes_every_module(register: Callable[..., Any]) -> None:
    handle = register(hook)
    try:
        assert observed(nn.Linear(2, 2))
    finally:
        handle.remove()
    assert not observed(nn.Linear(2, 2))


def test_a_forward_in_the_place_of_the_classs_observes() -> None:
    module = nn.Linear(2, 2)
    module.forward = hook  # type: ignore[assignment]
    assert observed(module)


def test_hooks_of_torch_and_megatron_do_not() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(partial(_apply_to_tensors, torch.clone))
    megatrons = type("Hook", (), {"__module__": "megatron.core.distributed", "__call__": hook})()
    module.register_forward_hook(megatrons)
    assert not observed(module)
    others = type("Hook", (), {"__module__": "megatronic.models", "__call__": hook})()
    module.register_forward_hook(others)
    assert observed(module)
