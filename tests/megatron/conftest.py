import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.megatron import cpu

    cpu.install()
    import tiny


@pytest.fixture(scope="session", autouse=True)
def parallel_state() -> Iterator[None]:
    """One rank of Megatron's parallel state for the whole session."""
    with tiny.one_rank():
        yield
