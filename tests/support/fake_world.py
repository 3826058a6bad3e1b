"""A rank of any world in one process: Megatron builds its part of a model there, and nothing is ever sent."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fc.planning.layout import Layout
from rank import join, leave


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[None]:
    """Be that rank; the test file's own world of one is left and joined again."""
    leave()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        leave()
        join()
