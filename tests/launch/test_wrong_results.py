"""What the scripts make of Megatron's exit codes 16, compute it again on another GPU, and 17, wrong."""

import json
import re
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.site_files import Site, samples

pytestmark = pytest.mark.slow

NODES = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")
END = ("COMPLETED", "FAILED")


def submit(cluster: Cluster, site: Site, *words: str) -> str:
    return cluster.run(*site.words("moe7b.sh", *NODES, *words), **site.variables, CHECK="no").stdout.split()[-1]


def test_the_next_start_computes_on_the_neighbouring_gpu(cluster: Cluster, site: Site, tmp_path: Path) -> None:
    """A program in the place of Python shows what it is told and ends as Megatron does."""
    program, run_dir = tmp_path / "python", site.run_dir("shifted")
    program.write_text(
        '#!/bin/bash\n[[ $3 != preflight ]] || exit 0\necho "rank $RANK on GPU $LOCAL_RANK"\n'
        f"if [[ -e {run_dir}/shift ]]; then exit 17; fi\nexit 16\n"
    )
    program.chmod(0o755)
    site.write(more=f"PYTHON={program}\n")
    job = submit(cluster, site, f"run_dir={run_dir}")
    ended = cluster.wait(job, *END)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "1")
    first, second = site.log(job).split("launch: requeued")
    for log, gpus in ((first, (0, 1)), (second, (1, 0))):
        assert sorted(re.findall(r"rank \d on GPU \d", log)) == [f"rank {rank} on GPU {gpus[rank]}" for rank in (0, 1)]
    assert "launch: stuck: a loss was NaN or infinite (exit code 17)" in second
    assert not (run_dir / "shift").exists()


@pytest.mark.soak
def test_a_wrong_loss_is_computed_again_on_another_node(cluster: Cluster, site: Site) -> None:
    """On the CPU a device is known by its node alone."""
    run_dir = site.run_dir("wrong")
    site.write(*samples(400_000), "error_injection_rate=6", "error_injection_type=correct_result")
    words = (f"run_dir={run_dir}", "--no-requeue")
    first = submit(cluster, site, *words, "--nodelist=n0")
    assert cluster.wait(first, *END)["ExitCode"] == "75:0"
    assert "ended with code 16, not at the target" in site.log(first)

    second = submit(cluster, site, *words, "--nodelist=n1")
    assert cluster.wait(second, *END)["ExitCode"] == "3:0"
    assert (run_dir / "state").read_text() == "stuck\n"
    ends = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()][1::2]
    number = ends[0]["iteration"] + 1
    assert re.match(f"iteration {number}: found .* also when it was repeated on device cpu of n0: ", ends[0]["reason"])
    assert ends[1]["reason"].endswith(f"to go on without it: iterations_to_skip=[{number}] rerun_mode=disabled")
    rank = re.search(r"logs/rank(\d)\.log says whether device cpu of n0, or the data", ends[1]["reason"])
    assert rank is not None, ends[1]["reason"]
    assert "Correct result (but possible Application error)" in (run_dir / f"logs/rank{rank[1]}.log").read_text()
