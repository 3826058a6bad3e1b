"""A parcel: what one module leaves for another about a tensor, valid for the value that the tensor has now."""

import weakref
from typing import Any

import torch
from torch import Tensor


class Parcel[Content]:
    """Room for one content, that of the last tensor it was left for.

    The content is given to whoever brings that tensor: the same object, not written to since (torch counts writes),
    with gradients on or off as they were. Otherwise there is none, and the taker computes from the tensor itself: a
    parcel that is lost costs time, never correctness. Nothing is kept of inference tensors, of which torch counts no
    writes, of fake tensors, and under torch.compile.

    The tensor knows nothing of it, so nothing rides along into its pickles and copies; a module's have an empty parcel.
    The content is gone when it is taken, and with the tensor. So it must not keep the tensor alive.
    """

    def __init__(self) -> None:
        self._left: tuple[weakref.ref[Tensor], tuple[Any, ...], Content] | None = None

    def leave(self, tensor: Tensor, content: Content) -> None:
        if type(tensor) is not Tensor or torch.compiler.is_compiling():
            return
        state = _state(tensor)
        if state is not None:
            self._left = (weakref.ref(tensor, self._gone), state, content)

    def take(self, tensor: Tensor) -> Content | None:
        left, self._left = self._left, None
        if left is None or left[0]() is not tensor or left[1] != _state(tensor):
            return None
        return left[2]

    def _gone(self, tensor: "weakref.ref[Tensor]") -> None:
        if self._left is not None and self._left[0] is tensor:
            self._left = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _state(tensor: Tensor) -> tuple[Any, ...] | None:
    with torch._C.DisableTorchFunction():  # whom a mode of torch functions would ask four times
        if tensor.is_inference():
            return None
        return tensor._version, tensor.data_ptr(), torch.is_grad_enabled()


def values_of(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What tells the present values of parameters from others that they had or will have."""
    return tuple(None if t is None else (id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
