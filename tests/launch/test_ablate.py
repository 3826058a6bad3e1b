"""launch/ablate.sh on a real SLURM: an array of a suite's runs, and its table from what they leave."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.cluster import Cluster, unavailable
from support.compress_commands import run
from support.site_files import Site, samples

pytestmark = pytest.mark.soak

NODES = ("-N", "1", "--ntasks-per-node", "2", "--gpus-per-node=2", "-c1", "-t", "60")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two fake GPUs each."""
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, gpus=2) as running:
        yield running


def test_an_array_of_what_is_left(cluster: Cluster, site: Site, tmp_path: Path, config: Path) -> None:
    suite = tmp_path / "small.yaml"
    variants = {"residual": {"connection": "residual"}, "dfc_x4": {"connection": "dfc", "rate": 4}}
    content = {"config": str(Path("configs/olmoe_7b.yaml").resolve()), "seeds": [5, 6], "baseline": "residual"}
    suite.write_text(yaml.safe_dump(content | {"variants": variants}, sort_keys=False))
    site.write(*samples(16), "save_interval=2")
    folders = site.run_dir("ablated")
    words = site.words(f"ablate.sh {suite}", *NODES, "at_once=2", f"run_dir={folders}")
    submitted = cluster.run(*words, **site.variables)
    job = submitted.stdout.split()[-1]
    for element in range(4):
        state = cluster.wait(f"{job}_{element}", "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
        assert state["JobState"] == "COMPLETED", submitted.stdout + submitted.stderr
    table = ["ablate", suite, *site.overrides, "--out", folders, "--results", tmp_path / "results", "--table"]
    done = run(tmp_path, *table)
    assert done.code == 0, done.printed
    names = {f"{variant}-seed{seed}.json" for variant in variants for seed in (5, 6)}
    assert names < {path.name for path in (tmp_path / "results").iterdir()}
    assert "| dfc_x4 | residual | 2 |" in done.printed
