from importlib.util import find_spec
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("modelopt") is not None:
        return
    skip = pytest.mark.skip(reason="needs NVIDIA ModelOpt: run `make test-modelopt`")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(skip)
