"""A parcel opens for one value of one tensor, and lives no longer than it."""

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fc.connections.parcel import Parcel, values_of


def left(tensor: Tensor) -> Parcel[str]:
    parcel: Parcel[str] = Parcel()
    parcel.leave(tensor, "content")
    return parcel


def test_it_is_taken_once_by_the_tensor_that_it_was_left_for() -> None:
    tensor = torch.ones(3)
    parcel = left(tensor)
    assert parcel.take(tensor) == "content"
    assert parcel.take(tensor) is None
    parcel.leave(tensor, "first")
    parcel.leave(tensor, "second")
    assert parcel.take(tensor) == "second"


def write_under_no_grad(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        tensor[1:] += 1
    return tensor


def write_to_detached(tensor: Tensor) -> Tensor:
    tensor.detach().mul_(2)
    return tensor


def write_to_view(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = 5
    return tensor


def put_other_storage(tensor: Tensor) -> Tensor:
    tensor.data = tensor.data + 1
    return tensor


@pytest.mark.parametrize(
    "change",
    [write_under_no_grad, write_to_detached, write_to_view, put_other_storage, Tensor.clone, Tensor.detach, copy.copy],
)
def test_no_other_value_opens_it(change: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.ones(3)
    parcel = left(tensor)
    assert parcel.take(change(tensor)) is None
    assert parcel.take(tensor) is None, "what was tried is gone"


def test_it_is_made_with_or_without_gradients() -> None:
    tensor = torch.ones(3)
    parcel = left(tensor)
    with torch.no_grad():
        assert parcel.take(tensor) is None


def test_of_tensors_whose_writes_nobody_counts_nothing_is_kept() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert left(tensor).take(tensor) is None
    with FakeTensorMode():
        tensor = torch.ones(3)
        assert left(tensor).take(tensor) is None


def test_it_goes_with_its_tensor_and_into_no_copy() -> None:
    class Content: ...

    tensor, parcel = torch.ones(3), Parcel[Content]()
    parcel.leave(tensor, Content())
    for again in (copy.copy(parcel), copy.deepcopy(parcel), pickle.loads(pickle.dumps(parcel))):
        assert again.take(tensor) is None
    assert vars(tensor) == {}
    parcel.leave(tensor, Content())
    del tensor
    gc.collect()
    assert not any(isinstance(thing, Content) for thing in gc.get_objects())


def test_values_of_parameters() -> None:
    one, other = torch.ones(2), torch.ones(2)
    before = values_of(one, None, other)
    assert before == values_of(one, None, other) != values_of(other, None, one)
    other.mul_(1)
    written = values_of(one, None, other)
    one.data = one.data.clone()
    assert len({before, written, values_of(one, None, other)}) == 3
