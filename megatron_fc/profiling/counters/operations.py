"""Bytes of device memory that one operation reads and writes, from its arguments and results.

The rule: every tensor that goes in is read once, every one that comes out is written once, whatever a cache may save or
a kernel may do twice. Views and allocation move nothing, what is expanded has its real elements, in-place operations
read and write. `_FORMULAS` lists the operations that touch less than that. Attention kernels and the fused
`megatron_fc::frac_*` follow the rule: streams, coefficients, parameters and gradients are moved once (the mixed
residual, which has no storage, is one element); what programs sum up in memory of their own is left out.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Moved(NamedTuple):
    """Bytes of one call."""

    read: int
    written: int


NOTHING = Moved(0, 0)


def moved(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, device: str | None = None) -> Moved:
    """Bytes that a call of `op` has moved.

    Args:
        op: operator overload, as a TorchDispatchMode gets it.
        args, kwargs: of the call.
        out: its result.
        device: type of the device whose memory counts, say "cuda"; None for all.
    """
    how = _how(op)
    if how.nothing:
        return NOTHING
    if how.formula is not None:
        return how.formula(args, kwargs, out) if device in (None, args[0].device.type) else NOTHING

    def here(values: Iterable[Any]) -> list[Tensor]:
        return [tensor for tensor in _tensors(values) if device in (None, tensor.device.type)]

    read = here(value for place, value in _by_place(args, kwargs) if place not in how.unread)
    changed = here(value for place, value in _by_place(args, kwargs) if place in how.changed)
    if how.changed:
        return Moved(nbytes(read), nbytes(changed))
    results = here([out])
    inputs = {tensor.untyped_storage()._cdata for tensor in read}
    fresh = [tensor for tensor in results if tensor.untyped_storage()._cdata not in inputs]
    return NOTHING if results and not fresh else Moved(nbytes(read), nbytes(fresh))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct elements of tensors that may be expanded, the same, or views of one another."""
    views: dict[tuple[Any, ...], int] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        shape, strides = tensor.shape, tensor.stride()
        elements = prod(size for size, stride in zip(shape, strides, strict=True) if stride != 0 or size == 0)
        views[storage._cdata, tensor.storage_offset(), shape, strides] = elements * tensor.dtype.itemsize
        sizes[storage._cdata] = storage.nbytes()
    if len(views) == len(sizes):
        return sum(views.values())
    totals = dict.fromkeys(sizes, 0)
    for (storage, *_), size in views.items():
        totals[storage] += size
    return sum(min(total, sizes[storage]) for storage, total in totals.items())


class _How(NamedTuple):
    """What the schema of an operation says about its arguments, by their position or name."""

    nothing: bool
    formula: "_Formula | None" = None
    unread: frozenset[int | str] = frozenset()
    changed: frozenset[int | str] = frozenset()


_Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], Moved]
# In place, of values that do not depend on those before.
_OVERWRITE = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"})
_ALLOCATE = ("empty", "new_empty")
_NOTES = frozenset({"record_stream"})  # for the allocator, though its schema says that it writes the tensor
# Of other than these: communication is counted elsewhere, a profiler's marks are none of the step's.
_NOT_MEMORY = frozenset({"c10d", "_c10d_functional", "profiler", "prim"})


@cache
def _how(op: Any) -> _How:
    schema = getattr(op, "_schema", None)
    if schema is None:  # a higher-order operator
        return _How(False)
    name = schema.name.split("::")[1]
    views = op.is_view or torch.Tag.inplace_view in op.tags
    if views or op.namespace in _NOT_MEMORY or name.startswith(_ALLOCATE) or name in _NOTES:
        return _How(True)
    unread: set[int | str] = set()
    changed: set[int | str] = set()
    for position, argument in enumerate(schema.arguments):
        place = argument.name if argument.kwarg_only else position
        # Of fused optimizers: written only to take a loss scale off them, which Megatron does itself.
        writes = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        if writes:
            changed.add(place)
        shape_only = position == 0 and (name.endswith("_like") or name.startswith("new_"))
        overwrites = name.removeprefix("_foreach_") in _OVERWRITE or argument.is_out
        if (writes and overwrites) or shape_only:
            unread.add(place)
    return _How(False, _FORMULAS.get(op.overloadpacket), frozenset(unread), frozenset(changed))


def _by_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[tuple[int | str, Any]]:
    yield from enumerate(args)
    yield from kwargs.items()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors in arguments or results; torch's own tree functions take several times as long for every call."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _gather(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Moved:
    """Reads the elements that it returns, and where they are."""
    table, where = args[0], _tensors([args[1:], kwargs])
    return Moved(min(nbytes([table]), nbytes([out])) + nbytes(where), nbytes([out]))


def _embedding_bag(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Moved:
    """Reads the rows of the table that are in bags; the first result is all that a sum needs."""
    table, index = args[:2]
    rows = min(nbytes([table]), index.numel() * table.shape[-1] * table.dtype.itemsize)
    return Moved(rows + nbytes(_tensors([args[1:], kwargs])), nbytes([out[0]]))


def _scatter(args: tuple[Any, ...], kwargs: dict[str, Any], _: Any, adds: bool, source: int) -> Moved:
    """Writes as many elements as the source has, after reading them where it adds; `source` is its position."""
    table, values = args[0], args[source] if len(args) > source else kwargs.get("src", kwargs.get("source"))
    count = values.numel() if isinstance(values, Tensor) else args[source - 1].numel()
    return _touched(count, table, [args[1:], kwargs], adds)


def _touched(count: int, table: Tensor, others: list[Any], adds: bool) -> Moved:
    """Writes `count` elements of a table, after reading them where it adds, and reads the other tensors."""
    touched = min(nbytes([table]), count * table.dtype.itemsize)
    return Moved(nbytes(_tensors(others)) + (touched if adds else 0), touched)


def _index_put(args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Moved:
    """Writes the elements that are indexed; a number behind a mask is `masked_fill_` to torch, which goes over all."""
    table, indices, values = args[:3]
    accumulates = bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
    there = _tensors(indices)
    if values.numel() == 1 and not accumulates and [index.dtype for index in there] == [torch.bool]:
        return Moved(nbytes([table, *there]), nbytes([table]))
    count, sizes = prod(torch.broadcast_shapes(*map(_places, there))), list(table.shape)
    for index in indices:
        taken = [sizes.pop(0) for _ in range(index.ndim if index is not None and index.dtype == torch.bool else 1)]
        count *= taken[0] if index is None else 1  # a slice among the indices
    return _touched(count * prod(sizes), table, [args[1:], kwargs], accumulates)


def _places(index: Tensor) -> tuple[int, ...]:
    """Shape of the places that an index names; a mask without data could name any."""
    if index.dtype != torch.bool:
        return tuple(index.shape)
    return (index.numel() if index.is_meta else int(index.count_nonzero()),)


_FORMULAS: dict[Any, _Formula] = {
    aten.embedding: _gather,
    aten.index: _gather,
    aten.index_select: _gather,
    aten.gather: _gather,
    aten.masked_select: _gather,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
    aten.index_put_: _index_put,
    aten._index_put_impl_: _index_put,
    aten.scatter_: partial(_scatter, adds=False, source=3),
    aten.index_copy_: partial(_scatter, adds=False, source=3),
    aten.scatter_add_: partial(_scatter, adds=True, source=3),
    aten.index_add_: partial(_scatter, adds=True, source=3),
}
