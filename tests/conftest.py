import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Everything but the gpu-marked tests runs on the CPU lane, on a machine with GPUs too.
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "gpu" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` on one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
