"""A run on a real SLURM that everything happens to: its curve is that of a run which nobody disturbed."""

import contextlib
import itertools
import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from megatron_fc.runs.metrics import read_metrics
from megatron_fc.training.machine import has_apex, has_transformer_engine
from support import harness
from support.cluster import Cluster, unavailable
from support.disk import SlowDisk
from support.patience import wait_until
from support.site_files import ASYNCHRONOUS, REPOSITORY, Site, samples
from support.training_runs import figures

pytestmark = pytest.mark.slow

ITERATIONS, BATCH, SAVE_INTERVAL = 64, 4, 5
LAYOUT = ("tensor_model_parallel_size=2", "sequence_parallel=true", "pipeline_model_parallel_size=2")
EXPERTS = ("expert_model_parallel_size=2", "expert_tensor_parallel_size=1")
OVERRIDES = (*LAYOUT, *EXPERTS, *samples(ITERATIONS * BATCH), f"save_interval={SAVE_INTERVAL}")
TASKS = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--signal=B:USR1@600", "--time=60")


def submit(cluster: Cluster, site: Site, nodes: int, run_dir: Path) -> str:
    """The job's number."""
    words = site.words("moe7b.sh", f"--nodes={nodes}", *TASKS, f"run_dir={run_dir}")
    return cluster.run(*words, **site.variables, CHECK="no").stdout.split()[-1]


class Run:
    """The job, as its user sees it."""

    def __init__(self, cluster: Cluster, site: Site, nodes: int) -> None:
        self.cluster, self.site, self.dir = cluster, site, site.run_dir(f"on-{nodes}-nodes")
        self.world = 2 * nodes
        self.job = submit(cluster, site, nodes, self.dir)

    def starts(self) -> list[dict]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.dir / "starts.jsonl").read_text().splitlines()]
        return []

    def wait_for_start(self, number: int) -> int:
        """Until it trains for the nth time; returns the iteration that it goes on from."""
        return self._wait(lambda: [e for e in self.starts() if e["event"] == "start"][number - 1 :])[0]["iteration"]

    def wait_for_iteration(self, iteration: int) -> None:
        self._wait(lambda: max(read_metrics(self.dir).loss, default=0) >= iteration)

    def _wait[T](self, condition: Callable[[], T]) -> T:
        def condition_or_end() -> T:
            state = self.cluster.job(self.job)["JobState"]
            value = condition()
            assert value or state not in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"), self.site.log(self.job)
            return value

        return wait_until(condition_or_end, lambda: self.site.log(self.job))

    def limit(self, minutes: int) -> None:
        self.cluster.run("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_time_limit_preemption_node_loss_and_kill_9(nodes: int, cluster: Cluster, site: Site, tmp_path: Path) -> None:
    """With the plain optimizer: without TE or Apex, Megatron resumes no distributed one."""
    run = survive(cluster, site, nodes, (*OVERRIDES, *ASYNCHRONOUS) if nodes == 4 else OVERRIDES)
    undisturbed = tmp_path / "undisturbed"
    words = ["train", str(REPOSITORY / "configs/olmoe_7b.yaml"), *site.overrides, f"run_dir={undisturbed}"]
    assert harness.run("command_line", run.world, tmp_path / "ranks", words) == [0] * run.world
    assert figures(run.dir) == figures(undisturbed)


@pytest.mark.gpu
def test_the_same_with_the_distributed_optimizer_on_gpus(site: Site, tmp_path: Path) -> None:
    """On a machine with a GPU for each rank, which become those of the nodes. Not run anywhere yet."""
    if reason := unavailable():
        pytest.skip(reason)
    if torch.cuda.device_count() < 8 or not (has_apex() or has_transformer_engine()):
        pytest.skip("needs 8 GPUs, and Transformer Engine or Apex for the distributed optimizer")
    undisturbed = tmp_path / "undisturbed"
    with Cluster(tmp_path / "slurm", nodes=5, gpus=2, are_real=True) as cluster:
        run = survive(cluster, site, 4, (*OVERRIDES, "use_distributed_optimizer=true", "distributed_backend=nccl"))
        job = submit(cluster, site, 4, undisturbed)
        assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert figures(run.dir)["lm loss"] == figures(undisturbed)["lm loss"]


def survive(cluster: Cluster, site: Site, nodes: int, overrides: Sequence[str]) -> Run:
    """Submit, disturb in four ways, wait for the end."""
    disk = SlowDisk(site.folder / "seconds")
    disk.takes(10)  # or the run might end before SLURM looks at its limit, twice a minute, or preempts it
    site.write(*overrides, more=disk.exports)
    run = Run(cluster, site, nodes)

    run.wait_for_start(1)
    run.wait_for_iteration(3)
    elapsed = cluster.job(run.job)["RunTime"].split(":")
    run.limit(int(elapsed[-2]) + 10)  # so the signal, ten minutes before the limit, comes now, and nine are left
    wait_until(lambda: cluster.job(run.job)["Restarts"] == "1", lambda: site.log(run.job))
    run.limit(60)
    from_limit = run.wait_for_start(2)
    assert from_limit >= 3

    run.wait_for_iteration(from_limit + 2)
    wanted = f"-N{cluster.nodes - nodes + 1}"  # one more than are free
    urgent = cluster.run("sbatch", "-p", "urgent", wanted, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    cluster.wait(urgent.stdout.split()[-1], "COMPLETED")
    from_preemption = run.wait_for_start(3)
    assert from_preemption >= from_limit + 2
    assert run.starts()[-2]["reason"] == "signal TERM"
    assert (run.dir / "launches").read_text().split() == ["0", str(from_limit), "preempted", str(from_preemption)]

    last = (from_preemption // SAVE_INTERVAL + 2) * SAVE_INTERVAL
    disk.hangs_at(last)
    run.wait_for_iteration(last)
    lost = run.starts()[-1]["host"][nodes // 2]
    cluster.kill_node(int(lost.removeprefix("n")))
    disk.hangs_at(last + SAVE_INTERVAL)
    from_loss = run.wait_for_start(4)
    assert from_loss == last - SAVE_INTERVAL
    assert lost not in run.starts()[-1]["host"]
    cluster.start_node(int(lost.removeprefix("n")))

    run.wait_for_iteration(last + SAVE_INTERVAL)
    killed = run.world - 2
    run.cluster.signal_rank(killed, run.job, signal.SIGKILL)
    disk.is_well()
    from_kill = run.wait_for_start(5)
    assert from_kill == last < ITERATIONS

    done = cluster.wait(run.job, "COMPLETED", "FAILED")
    # One restart for each disturbance; these lines say what else may have cost one, and the whole log is too long.
    log = "\n".join(re.findall(r"^.*(?:launch|srun|preflight|megatron-fc): .*", site.log(run.job), re.MULTILINE))
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "4"), log
    assert (run.dir / "state").read_text() == "done\n"
    check_samples(run, from_limit, from_preemption, from_loss, from_kill)
    assert "signal USR1" in [event.get("reason") for event in run.starts()]
    assert any(str(event.get("reason")).startswith(f"lost rank {killed} (process ") for event in run.starts())
    return run


def check_samples(run: Run, *resumed: int) -> None:
    """Every batch counts once: each start goes on with its checkpoint's samples, the last one ends at the target."""
    starts = [event for event in run.starts() if event["event"] == "start"]
    assert [event["iteration"] for event in starts] == [0, *resumed]
    for event in starts:
        assert event["consumed_samples"] == event["iteration"] * BATCH
        assert event["target_samples"] == ITERATIONS * BATCH
        assert event["checkpoint"] == (
            str(run.dir / "checkpoints" / f"iter_{event['iteration']:07d}") if event["iteration"] else None
        )
    last_rank = run.dir / f"logs/rank{run.world - 1}.log"
    lines = re.findall(r"iteration +(\d+)/ +\d+ \| consumed samples: +(\d+)", last_rank.read_text())
    assert all(int(samples) == int(iteration) * BATCH for iteration, samples in lines)
    assert {int(iteration) for iteration, _ in lines} == set(range(1, ITERATIONS + 1))
    # From start to start, iterations follow each other without a gap.
    steps = [int(iteration) for iteration, _ in lines]
    jumps = [after for before, after in itertools.pairwise(steps) if after != before + 1]
    assert all(after - 1 in resumed for after in jumps)
    end = run.starts()[-1]
    assert (end["event"], end["reason"]) == ("end", "target")
    assert (end["iteration"], end["consumed_samples"]) == (ITERATIONS, ITERATIONS * BATCH)
