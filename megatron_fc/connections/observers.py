"""Observers of modules: hooks that neither torch, Megatron nor this package has put there, as people do to look inside.

They are shown what the call of a module means, tensors in and tensors out, and what they change counts: so observed
modules run apart, where others hand over objects of their own or make two results in one pass.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# Whose hooks know tensors only by looking through what they are given, or look at no argument at all.
_KNOWN = ("megatron.", "megatron_fc.", "megatron_fsdp.", "torch.distributed.", "torch.utils.")
_OF_A_MODULE = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def observed(*modules: nn.Module) -> bool:
    """Whether somebody looks at calls of one of these modules: by hooks, its own or global, or a forward put on it."""
    if any(_foreign(getattr(torch_module, hooks)) for hooks in _OF_ALL):
        return True
    for module in modules:
        state = module.__dict__
        if "forward" in state or any(_foreign(state[hooks]) for hooks in _OF_A_MODULE):
            return True
    return False


def _foreign(hooks: dict[int, Callable[..., Any]]) -> bool:
    return bool(hooks) and not all(f"{_owner(hook)}.".startswith(_KNOWN) for hook in hooks.values())


def _owner(hook: Callable[..., Any]) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__
