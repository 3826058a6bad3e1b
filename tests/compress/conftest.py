from importlib.util import find_spec

import pytest

import support.cpu_megatron  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("modelopt") is not None:
        return
    skip = pytest.mark.skip(reason="needs NVIDIA ModelOpt: run `make test-modelopt`")
    for item in items:
        if "modelopt" in item.keywords:
            item.add_marker(skip)
