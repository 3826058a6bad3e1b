import os
from collections.abc import Iterator

import pytest
import torch

from support import fork_server

pytest_plugins = ["support.schedule", "support.times", "support.touched"]


def pytest_configure(config: pytest.Config) -> None:
    # Everything but the gpu-marked tests runs on the CPU lane, on a machine with GPUs too.
    if not _is_gpu_run(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("the gpu-marked tests need a CUDA device, and torch sees none")
    fork_server.begin()  # before the workers start, which share its servers


def pytest_unconfigure() -> None:
    fork_server.end()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _is_gpu_run(config):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _is_gpu_run(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr


def _environment_as_before() -> Iterator[None]:
    """Undo what Megatron and a world of one rank leave in this process's environment; other tests would follow it."""
    before = os.environ.copy()
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


# What fixtures of a file leave there is for the file alone.
environment_of_a_test = pytest.fixture(autouse=True)(_environment_as_before)
environment_of_a_file = pytest.fixture(autouse=True, scope="module")(_environment_as_before)


@pytest.fixture(autouse=True, scope="module")
def world_left_as_found() -> Iterator[None]:
    """Fail the file that leaves torch.distributed's world behind, instead of whichever comes next in its process."""
    yield
    assert not torch.distributed.is_initialized()
