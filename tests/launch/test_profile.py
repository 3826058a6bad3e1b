"""launch/profile.sh on a real SLURM: four ranks on two nodes count what they move, also when one of them is lost."""

import contextlib
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from megatron_fc.planning.counts import total_device, total_network
from megatron_fc.profiling.files import read_part, read_parts, read_report
from megatron_fc.profiling.records import Report
from support.cluster import Cluster
from support.patience import wait_until
from support.site_files import ASYNCHRONOUS, ENDED, REPOSITORY, Site, run_on_login_node, samples, submit_to_two_nodes

pytestmark = pytest.mark.slow

CONFIG = "configs/olmoe_7b.yaml"


def profiled(two_nodes: Cluster, site: Site, folder: Path, *words: str) -> Report:
    """Let a job profile into a folder, and return what it reports."""
    job = submit_to_two_nodes(two_nodes, site, f"profile.sh {CONFIG}", f"run_dir={folder}", *words)
    assert two_nodes.wait(job, *ENDED)["JobState"] == "COMPLETED", site.log(job)
    return read_report(folder)


def check_all_ranks_add_up(report: Report, folder: Path) -> None:
    """Everything that a rank left is in the report, once."""
    assert [rank.rank for rank in report.ranks] == [0, 1, 2, 3]
    assert [rank.host for rank in report.ranks] == ["n0", "n0", "n1", "n1"]
    assert not report.warnings()
    parts = read_parts(folder)
    assert [part.rank for part in parts] == report.ranks
    of_ranks = total_device(count for part in parts for count in part.device.values())
    assert total_device(report.device.values()) == of_ranks
    assert total_device(count for rank in report.ranks for count in rank.kinds.values()) == of_ranks
    tokens = report.run.tokens_per_step * report.run.steps
    assert report.device_bytes_per_token == pytest.approx((of_ranks.read_bytes + of_ranks.written_bytes) / tokens)
    sent = total_network(count for rank in report.ranks for count in rank.network.values())
    expected = (sent.intra_node_bytes / tokens, sent.inter_node_bytes / tokens)
    assert report.network_bytes_per_token == pytest.approx(expected)


def test_two_stages_of_two_way_tensor_parallelism(two_nodes: Cluster, site: Site) -> None:
    layout = ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true")
    site.write(*samples(400), *layout, *ASYNCHRONOUS)  # a worker, and nothing for it to write
    folder = site.run_dir("tp2-pp2")
    report = profiled(two_nodes, site, folder, "from_step=1", "steps=2")
    check_all_ranks_add_up(report, folder)
    groups = report.by_group()
    assert groups["tp"][0] > 0
    assert groups["tp"][1] == 0, "tensor parallelism stays in the node"
    assert groups["pp"][1] > 0, "the two stages are on two nodes"
    assert groups["pp"][0] == 0
    layers = {key.module.split(".")[2] for key in report.device if key.module.startswith("decoder.layers.")}
    assert layers == {"0", "1"}, "layers are numbered through the stages"

    twin = read_report(folder / "residual")
    assert (report.run.connection, twin.run.connection) == ("dfc_x4", "residual")
    # Frac-Connections send no activations: the fp32 gradients of their parameters alone are summed in each ring of two.
    sums = 2 * 4 * (report.run.parameters - twin.run.parameters) / report.run.tokens_per_step
    assert groups["tp"][0] - twin.by_group()["tp"][0] == pytest.approx(sums)
    assert {**groups, "tp": None} == {**twin.by_group(), "tp": None}
    page = (folder / "traffic.html").read_text()
    assert "residual <small>counted" in page
    assert "dfc_x4, torch <small>counted" in page


@pytest.mark.soak
def test_two_replicas_of_two_way_expert_parallelism(two_nodes: Cluster, site: Site) -> None:
    site.write(*samples(400), "expert_model_parallel_size=2")
    folder = site.run_dir("ep2-dp2")
    report = profiled(two_nodes, site, folder, "from_step=1", "steps=1", "twin=no")
    check_all_ranks_add_up(report, folder)
    check_expert_groups(report)


def check_expert_groups(report: Report) -> None:
    groups = report.by_group()
    assert groups["ep"][0] > 0
    assert groups["ep"][1] == 0, "tokens go to experts in the node"
    assert groups["expert_dp"][1] > 0, "an expert's replicas are on two nodes"
    assert groups["expert_dp"][0] == 0
    assert groups["dp"][0] > 0
    assert groups["dp"][1] > 0, "the ring of all four passes through both nodes"


@pytest.mark.parametrize("way", ["dies", pytest.param("hangs", marks=pytest.mark.soak)])
def test_a_rank_that_is_lost_in_the_window(way: str, two_nodes: Cluster, site: Site) -> None:
    # The real Python: a process that stands in its place would be stopped alone.
    more = f"PYTHON={sys.executable}\n" if way == "hangs" else ""
    site.write(*samples(400_000), "expert_model_parallel_size=2", more=more)
    folder = site.run_dir(f"profile-{way}")
    job = submit_to_two_nodes(
        two_nodes, site, f"profile.sh {CONFIG}", "from_step=1", "steps=10000", "twin=no", f"run_dir={folder}"
    )
    counted = [folder / "parts" / f"rank-{rank:05}.json" for rank in range(4)]
    wait_until(
        lambda: all(part.exists() and len(read_part(part).rank.step_seconds) >= 2 for part in counted),
        lambda: site.log(job),
    )
    send("3", folder, signal.SIGKILL if way == "dies" else signal.SIGSTOP)
    if way == "hangs":  # of which SLURM tells the script shortly before the time limit
        two_nodes.run("scancel", "--batch", "--signal=USR1", job)
    assert two_nodes.wait(job, *ENDED)["JobState"] == "FAILED"

    report, log = read_report(folder), site.log(job)
    assert [rank.rank for rank in report.ranks] == [0, 1, 2, 3]
    assert all(len(rank.step_seconds) >= 2 and rank.device_bytes_per_step > 0 for rank in report.ranks)
    check_expert_groups(report)
    for rank in report.ranks:
        assert f"WARNING: Rank {rank.rank} on {rank.host} counted {len(rank.step_seconds)} of 10000 steps" in log
    assert 'class="warning"' in (folder / "traffic.html").read_text()
    if way == "dies":
        assert re.search(rf"lost rank 3 \(.*\), .*: `megatron-fc traffic merge {folder}` reports what", log)


def send(rank: str, run_dir: Path, number: int) -> None:
    """Signal a rank, not the shell that started it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_python = f"run_dir={run_dir}" in process.cmdline() and "megatron_fc" in process.cmdline()[:5]
            if is_python and process.environ().get("SLURM_PROCID") == rank:
                process.send_signal(number)


def test_dry_run_and_mistakes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECK", "no")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    site.write()
    done = run_on_login_node(site, f"profile.sh {CONFIG}", "--dry-run", "from_step=20", "steps=5", "rate=2")
    sbatch, srun = done.stdout.splitlines()[:2]
    folder = site.run_dir("profile-olmoe_7b-dfc_x2")
    assert sbatch.rstrip().endswith(f"profile.sh {CONFIG} from_step=20 steps=5 rate=2 run_dir={folder} checked=2x8")
    assert f"-m megatron_fc traffic run --from-step 20 --steps 5 {CONFIG} save_interval=null " in srun
    assert srun.rstrip().endswith(f"rate=2 run_dir={folder}")

    done = run_on_login_node(site, "profile.sh configs/none.yaml", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("launch: 'configs/none.yaml' is no file: launch/profile.sh CONFIG.yaml ")
    assert (REPOSITORY / CONFIG).exists()
