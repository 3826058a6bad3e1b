"""The order of the test files, and how pytest-xdist gives them to its workers.

A file's tests go to one worker, where its fixtures are made once. Files that take long come first: those that mostly
wait, for a cluster, lie beside others that compute, and none of them is the last to run.
"""

from typing import Any

import pytest

# The beginnings of their paths.
FIRST = (
    "tests/launch/test_survival",
    "tests/connections/kernels/test_in_interpreter",
    "tests/launch",
    "tests/distributed",
)
# Whose tests have no fixture in common.
APART = ("tests/connections/kernels/test_in_interpreter.py",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Of --dist loadfile, but for the files whose tests may lie apart."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file in APART else file

    return Files(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((place for place, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    items.sort(key=place)
