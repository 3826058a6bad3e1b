import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.megatron import cpu

    cpu.install()
    import rank
    from megatron.core import tensor_parallel


@pytest.fixture(scope="module", autouse=True)
def parallel_state() -> Iterator[None]:
    """One rank of Megatron's parallel state for a file; the next one in this process may be another folder's."""
    with rank.one_rank():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Megatron's random states exist, whichever test runs first."""
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
