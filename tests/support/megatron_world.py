"""Megatron's state of one rank, on the CPU lane: fixtures for whoever imports them."""

from collections.abc import Iterator

import pytest
from megatron.core import tensor_parallel

import rank


@pytest.fixture(scope="module", autouse=True)
def parallel_state() -> Iterator[None]:
    """One rank of Megatron's parallel state for a file; the next one in this process may be another folder's."""
    with rank.one_rank():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Megatron's random states exist, whichever test runs first."""
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
