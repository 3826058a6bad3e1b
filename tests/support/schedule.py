"""The order of the test files.

A file's tests go to one worker, where its fixtures are made once. Files that take long come first: those that mostly
wait, for a cluster, lie beside others that compute, and none of them is the last to run.
"""

import pytest

# The beginnings of their paths.
FIRST = (
    "tests/launch/test_survival",
    "tests/connections/kernels",
    "tests/launch",
    "tests/distributed",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((place for place, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    items.sort(key=place)
