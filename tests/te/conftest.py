"""Transformer Engine's layers without a GPU: built and put into checkpoints, never run. `make test-te` has TE."""

import contextlib
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

if find_spec("transformer_engine") is not None:  # else every file here is skipped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_fc.training import cpu_lane

        cpu_lane.install()
        import transformer_engine.pytorch  # noqa: F401  before CUDA is pretended: it looks for what is really there

        import rank


@pytest.fixture(scope="module", autouse=True)
def pretend_hopper() -> Iterator[None]:
    """What TE asks about the device while a layer is built; the CPU lane answers for the rest."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(rank.one_rank())
        for name, answer in {
            "is_available": True,
            "get_device_capability": (9, 0),
            "get_device_properties": SimpleNamespace(major=9, minor=0),
            "is_current_stream_capturing": False,
        }.items():
            stack.enter_context(patch(f"torch.cuda.{name}", return_value=answer))
        torch.manual_seed(1)
        yield
