"""Megatron's parallel state for a world of one rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state


@contextmanager
def one_rank() -> Iterator[None]:
    join()
    try:
        yield
    finally:
        leave()


def join() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def leave() -> None:
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
