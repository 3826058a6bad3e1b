"""launch/tokenize.sh on a real SLURM: an array of jobs, one of which meets its time limit."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fc.data.status import status
from support.cluster import Cluster, unavailable
from support.documents import contents, make, save_tokenizer, texts, write_documents, writer
from support.patience import wait_until
from support.site_files import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPT = str(REPOSITORY / "launch" / "tokenize.sh")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node."""
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=1, gpus=1) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    lines = ["export SBATCH_ACCOUNT= SBATCH_PARTITION=batch", f"PYTHON={sys.executable}", f"export PYTHONPATH={path}"]
    (tmp_path / "site.sh").write_text("\n".join(lines))
    return {"SITE": str(tmp_path / "site.sh")}


def test_a_task_that_is_told_of_its_time_limit_is_done_again(
    cluster: Cluster, site: dict[str, str], tmp_path: Path
) -> None:
    for name, number in (("a", 20_000), ("b", 300)):
        write_documents(tmp_path / "in" / f"{name}.jsonl", texts(number, seed=ord(name), longest=200))
    small, out = save_tokenizer(tmp_path / "small"), tmp_path / "out"
    words = ["--", str(tmp_path / "in"), "--out", str(out), "--tokenizer", str(small)]
    said = cluster.run(SCRIPT, "--time=10", "--mem-per-cpu=500M", *words, **site).stdout
    assert f"submitted; `megatron-fc data status {out}` shows how far it is" in said

    wait_until(lambda: writer(out, task=0), "a half-written file")
    job = cluster.run("squeue", "-h", "-r", "-o", "%F", "-t", "RUNNING").stdout.split()[0]
    for restarts in ("1", "1"):  # it is requeued once
        # What SLURM does 90 seconds before the limit.
        cluster.run("scancel", "--signal=USR1", f"{job}_0")
        wait_until(lambda: not writer(out, task=0), "the end of the task")
        wait_until(lambda: writer(out, task=0) or not _queued(cluster), lambda: cluster.run("squeue").stdout)
        assert cluster.job(f"{job}_0")["Restarts"] == restarts
    assert "task 0 failed: its time limit came before its end: give --time for a whole task" in status(out)

    cluster.run(SCRIPT, "--time=10", *words, **site)
    wait_until(lambda: (out / "manifest.json").exists(), lambda: cluster.run("squeue").stdout)
    make([tmp_path / "in"], tmp_path / "here", small, max_bytes=32 << 20)
    assert contents(out) == contents(tmp_path / "here")
    assert "is complete" in cluster.run(SCRIPT, "--time=10", *words, **site).stdout


def _queued(cluster: Cluster) -> str:
    return cluster.run("squeue", "-h").stdout


def test_what_is_wrong_is_said_on_the_login_node(cluster: Cluster, site: dict[str, str], tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl", texts(3))
    words = ["--", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    right = ["--", words[1], "--out", str(tmp_path / "right"), "--tokenizer", str(save_tokenizer(tmp_path / "small"))]
    assert (
        "sbatch refuses the job, as it says above"
        in cluster.run(SCRIPT, "--time=10", "--partition=none", *right, check=False, **site).stderr
    )
    assert "--sbatch has no time=" in cluster.run(SCRIPT, *words, check=False, **site).stderr
    assert "write options of sbatch as --NAME=VALUE" in cluster.run(SCRIPT, "-t", *words, check=False, **site).stderr
    shown = cluster.run(SCRIPT, "--dry-run", "--time=10", "--qos=low", *words, **site)
    assert shown.stdout.endswith(f"--executor slurm --python {sys.executable} --sbatch=time=10 --sbatch=qos=low \n")
    assert ", to sbatch --time=10 --qos=low with the script that it writes into logs/ of --out\n" in shown.stderr
    assert not (tmp_path / "out").exists()
