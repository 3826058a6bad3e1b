"""A rank that hangs on a real SLURM: the job says which one, starts again, and gives up in the end."""

import json
import re
import signal
import sys

import pytest

from support.cluster import Cluster
from support.disk import SlowDisk
from support.patience import wait_for_iteration
from support.site_files import Site, samples

pytestmark = pytest.mark.slow

NODES = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")


@pytest.mark.soak
def test_a_stopped_rank_and_then_a_disk_that_never_answers(cluster: Cluster, site: Site) -> None:
    disk = SlowDisk(site.folder / "seconds")
    disk.hangs_at(40)
    # The real Python: a process that stands in its place would be stopped alone.
    more = f"WAIT=5 MAX_STARTS=2 PYTHON={sys.executable}\n{disk.exports}"
    timeouts = ("distributed_timeout_minutes=2", "distributed_timeout_seconds_after_init=20")
    site.write(*samples(400), "save_interval=40", *timeouts, more=more)
    run_dir = site.run_dir()
    job = cluster.run(*site.words("moe7b.sh", *NODES), **site.variables, CHECK="no").stdout.split()[-1]

    wait_for_iteration(run_dir, 3)
    cluster.signal_rank(1, job, signal.SIGSTOP)
    done = cluster.wait(job, "COMPLETED", "FAILED")
    log = site.log(job)
    assert (done["ExitCode"], done["Restarts"]) == ("3:0", "2"), log
    assert log.count("ended with code 75, not at the target") + log.count("ended with code 137, not at") == 2
    assert "stuck: the last 2 starts began at iteration 0 and left no newer checkpoint" in log

    rank = r"rank {} \(process \d+ on n0\)"
    stopped = rf"no step for 1\d s: {rank.format(1)} without an answer; {rank.format(0)} in \w+ \(\S+\)"
    assert re.search(rf"megatron-fc: {stopped}, so this rank ends: nothing was saved yet, start the same command", log)
    ends = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()][1::2]
    assert re.fullmatch(stopped, ends[0]["reason"])
    assert re.match(rf"no step for 1\d s: {rank.format('[01]')}.* in \w+ ", ends[1]["reason"])
    assert "save_checkpoint" in (run_dir / "logs/rank0.log").read_text().rpartition("Current thread")[2]
