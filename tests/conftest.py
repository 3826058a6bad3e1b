import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Everything but the gpu-marked tests runs on the CPU lane, on a machine with GPUs too.
    if not _is_gpu_run(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("the gpu-marked tests need a CUDA device, and torch sees none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _is_gpu_run(config):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _is_gpu_run(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr
