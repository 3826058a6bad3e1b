from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import Cluster, unavailable
from support.site_files import Site, make_site

# The fixture that makes a tiny config and its data; pytest finds it by its name here.
from support.training_runs import config as config


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Five nodes with two fake GPUs each."""
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=5, gpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With two fake GPUs each."""
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, gpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Site:
    """A site file that shrinks the model of the production scripts and trains over gloo."""
    return make_site(tmp_path_factory.mktemp("site"), config)
