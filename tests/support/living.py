"""What a piece of code leaves alive in memory, storage by storage, whoever holds it: autograd, Python or a module."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Made(TorchDispatchMode):
    """Refers weakly to the storage of everything that is computed."""

    def __init__(self, peaks: bool) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._peaks = peaks
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = reference, storage.nbytes()
        if self._peaks:
            self.peak_bytes = max(self.peak_bytes, self.living_bytes())
        return results

    def living_bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@contextmanager
def living(peaks: bool = False) -> Iterator[_Made]:
    """Within it and behind it, `living_bytes()` counts what was computed in it and is alive, every storage once.

    `peak_bytes` is the most of it behind an operation, where `peaks` asks for it; views are of what was computed.
    """
    with _Made(peaks) as made:
        yield made
