from pathlib import Path

import pytest

import support.cpu_megatron  # noqa: F401
from support.evaluations import Trials

# Fixtures; pytest finds them by their names here.
from support.evaluations import tasks as tasks
from support.training_runs import config as config


@pytest.fixture(scope="module")
def trials(config: Path, tasks: Path) -> Trials:
    return Trials(config, tasks)
