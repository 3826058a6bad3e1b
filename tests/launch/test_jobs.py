"""Jobs on a real SLURM that go wrong, or take their time."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from megatron_fc.checkpoints.integrity import intact_checkpoints
from support.cluster import Cluster, unavailable
from support.disk import SlowDisk
from support.patience import wait_for_iteration, wait_until
from support.site_files import REPOSITORY, Site, samples

pytestmark = pytest.mark.slow

NODES = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=60")
END = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system for two checkpoints; mounted before the nodes start, as these see no later mounts."""
    if reason := unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def cluster(small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, gpus=2) as running:
        yield running


def submit(cluster: Cluster, site: Site, *words: str) -> list[str]:
    """The jobs' numbers."""
    printed = cluster.run(*words, **site.variables, CHECK="no").stdout
    return [line.split()[-1] for line in printed.splitlines()]


def test_unknown_partition(cluster: Cluster, site: Site) -> None:
    site.write(partition="nowhere")
    for more in ([], ["--dry-run"]):
        words = site.words("moe7b.sh", *NODES, *more)
        done = cluster.run(*words, check=False, **site.variables, CHECK="no")
        assert done.returncode == 2
        assert done.stderr.startswith("launch: sbatch refuses: ")
        assert "invalid partition" in done.stderr.lower()
        assert done.stderr.count("\n") == 1


def program(path: Path, *lines: str) -> str:
    """A program that stands in Python's place; the site's line for it. $3 is preflight or train."""
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)
    return f"PYTHON={path}\n"


def test_a_job_that_never_gets_anywhere_stops(cluster: Cluster, site: Site, tmp_path: Path) -> None:
    """A rank is killed in each of its pre-flight checks; the other one would wait for it."""
    waits = tmp_path / "waits"
    lines = (
        f"((SLURM_PROCID)) || {{ touch {waits}$SLURM_RESTART_COUNT; exec sleep 300; }}",
        f"until [[ -e {waits}$SLURM_RESTART_COUNT ]]; do sleep 0.1; done; kill -9 $$",
    )
    site.write(more=program(tmp_path / "python", *lines))
    run_dir = site.run_dir("hopeless")
    (job,) = submit(cluster, site, *site.words("moe7b.sh", *NODES, f"run_dir={run_dir}"))
    ended = cluster.wait(job, *END)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "3")
    assert "stuck: the last 3 starts began at iteration 0 and left no newer checkpoint; see" in site.log(job)
    assert (run_dir / "state").read_text() == "stuck\n"
    log = site.log(job)
    assert len(re.findall(r"^srun: error: n\d: task 1: Killed$", log, re.MULTILINE)) == 3, log
    began, over = (
        [datetime.fromisoformat(time) for time in re.findall(rf"^(\S+ \S+) launch: {said}", log, re.MULTILINE)]
        for said in (f"job {job}, start", r"ended with code 1\d\d, not")
    )
    assert all((last - first).seconds < 30 for first, last in zip(began[:3], over, strict=True)), "srun waits a minute"


@pytest.fixture
def stand_in(site: Site, tmp_path: Path) -> Path:
    """A program in Python's place that waits for TERM, or is deaf, in its first start, and is done in the second.

    What is returned is the folder of its run.
    """
    run_dir, program = site.run_dir("stand-in"), tmp_path / "python"
    shutil.rmtree(run_dir, ignore_errors=True)
    listens = 'import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit()); open(sys.argv[1], "w"); '
    program.write_text(
        f"#!/bin/bash\n[[ $3 != preflight ]] || exit 0\n"
        f"((SLURM_RESTART_COUNT)) && echo done >{run_dir}/state && exit 0\n"
        f"[[ ! $LISTENS ]] || exec {sys.executable} -c '{listens}signal.pause()' {run_dir}/waits\n"
        f"touch {run_dir}/waits\nexec sleep 600\n"
    )
    program.chmod(0o755)
    return run_dir


def refuse_a_second_job(cluster: Cluster, site: Site, run_dir: Path, job: str) -> None:
    sentence = f"job {job} has run_dir={run_dir}: scancel {job}, wait for it, or choose another run_dir\n"
    words = site.words("moe7b.sh", *NODES, f"run_dir={run_dir}")
    done = cluster.run(*words, check=False, **site.variables, CHECK="no")
    assert (done.returncode, done.stderr) == (2, f"launch: {sentence}")
    script, *options, run_dir_word = words
    second = cluster.run("sbatch", *options, script, run_dir_word, **site.variables).stdout.split()[-1]
    assert cluster.wait(second, *END)["ExitCode"] == "2:0"
    assert sentence in site.log(second)


def test_ranks_gpus_and_what_was_checked_are_compared(cluster: Cluster, site: Site, tmp_path: Path) -> None:
    site.write(more=program(tmp_path / "python", "echo no rank starts"))
    script = str(REPOSITORY / "launch/moe7b.sh")
    for name, options, sentence in (
        ("ntasks", ["--nodes=2", "--ntasks=1"], "SLURM gives 1 tasks for 1 nodes x 2 tasks: give --nodes and"),
        ("gpus", ["--nodes=2", "--ntasks-per-node=1"], "n0 has 2 GPUs for tasks: 1(x2); every GPU has a task: give"),
        ("checked", [], "SLURM gives 1 nodes x 2 tasks, and 2x2 were checked: submit again"),
    ):
        checked = ["checked=2x2"] if name == "checked" else []
        log = tmp_path / f"{name}.log"
        words = ["sbatch", f"--output={log}", *NODES, *options, script, f"run_dir={site.run_dir(name)}", *checked]
        job = cluster.run(*words, **site.variables).stdout.split()[-1]
        ended = cluster.wait(job, *END)
        assert (ended["ExitCode"], ended.get("Restarts", "0")) == ("2:0", "0"), log.read_text()
        assert f"launch: {sentence}" in log.read_text()
        assert "no rank starts" not in log.read_text()


def test_the_first_task_is_met_and_the_code_that_decides_is_taken(cluster: Cluster, site: Site, tmp_path: Path) -> None:
    """Where a list of hosts says which node has the first task, and the ranks end with 2, 75, and killed."""
    (tmp_path / "hosts").write_text("n1\nn1\nn0\nn0\n")
    lines = (
        'echo "$3: $SLURM_PROCID on $SLURMD_NODENAME meets at $MASTER_ADDR"',
        "[[ $3 == train ]] || exit 0",
        "case $SLURM_PROCID in 0) exit 2 ;; 1) kill -9 $$ ;; esac",
        "exit 75",
    )
    site.write(more=program(tmp_path / "python", *lines))
    run_dir = site.run_dir("listed")
    words = site.words("moe7b.sh", *NODES, "--nodes=2", "--distribution=arbitrary", f"run_dir={run_dir}")
    done = cluster.run(*words, **site.variables, CHECK="no", SLURM_HOSTFILE=str(tmp_path / "hosts"))
    job = done.stdout.split()[-1]
    ended = cluster.wait(job, *END)
    log = site.log(job)
    assert sorted(re.findall(r"preflight: (\d on n\d meets at n\d)", log)) == [
        f"{rank} on n{1 - rank // 2} meets at n1" for rank in range(4)
    ], log
    assert (ended["ExitCode"], ended.get("Restarts", "0")) == ("3:0", "0"), log
    assert "launch: stuck: the input is wrong, or a checkpoint cannot be read or written (exit code 2)" in log


def test_a_rank_that_ends_badly_after_the_target_costs_no_start(cluster: Cluster, site: Site, tmp_path: Path) -> None:
    run_dir = site.run_dir("reached")
    lines = ("[[ $3 == train ]] || exit 0", "((SLURM_PROCID)) || exit 75", f"echo done >{run_dir}/state")
    site.write(more=program(tmp_path / "python", *lines))
    (job,) = submit(cluster, site, *site.words("moe7b.sh", *NODES, f"run_dir={run_dir}"))
    ended = cluster.wait(job, *END)
    log = site.log(job)
    assert (ended["JobState"], ended["ExitCode"], ended.get("Restarts", "0")) == ("COMPLETED", "0:0", "0"), log
    assert "launch: the target is reached, and then the ranks ended with code 75\n" in log


def test_an_operators_requeue_is_no_scancel(cluster: Cluster, site: Site, stand_in: Path, tmp_path: Path) -> None:
    site.write(more=f"PYTHON={tmp_path}/python\nexport LISTENS=yes\n")
    (job,) = submit(cluster, site, *site.words("moe7b.sh", *NODES, f"run_dir={stand_in}"))
    wait_until((stand_in / "waits").exists, lambda: site.log(job))
    cluster.run("scontrol", "requeue", job)
    ended = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    log = site.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("launch: SLURM itself requeues this job") == 1, log
    assert "launch: cancelled" not in log


def test_scancel_ends_a_run(cluster: Cluster, site: Site, stand_in: Path, tmp_path: Path) -> None:
    site.write(more=f"PYTHON={tmp_path}/python\nexport LISTENS=yes\n")
    (job,) = submit(cluster, site, *site.words("moe7b.sh", *NODES, f"run_dir={stand_in}"))
    wait_until((stand_in / "waits").exists, lambda: site.log(job))
    refuse_a_second_job(cluster, site, stand_in, job)
    cluster.run("scancel", job)
    ended = cluster.wait(job, *END)
    assert "launch: cancelled, not requeued" in site.log(job)
    assert (ended["JobState"], ended.get("Restarts", "0")) == ("CANCELLED", "0"), site.log(job)
    assert "launch: requeued" not in site.log(job)


def test_deaf_ranks_are_killed_before_the_time_limit(
    cluster: Cluster, site: Site, stand_in: Path, tmp_path: Path
) -> None:
    site.write(more=f"PYTHON={tmp_path}/python\n")
    # The signal is due after ten seconds. A controller that is busy looks late, and the limit is not to come with it.
    limit = ("--time=2", "--signal=B:USR1@110")
    (job,) = submit(cluster, site, *site.words("moe7b.sh", *NODES, *limit, f"run_dir={stand_in}"))
    ended = cluster.wait(job, *END)
    log = site.log(job)
    # SLURM may send the next start, as short, the signal at once.
    assert ended["JobState"] == "COMPLETED", log
    assert int(ended["Restarts"]) >= 1, log
    assert re.search(r"got USR1.*\n(.*\n)*.*launch: ended with code \d+ after USR1, not at the target\n", log), log
    assert "got TERM" not in log, "the limit itself was not reached"


def test_a_preemption_while_the_ranks_still_start_does_not_count(
    cluster: Cluster, site: Site, stand_in: Path, tmp_path: Path
) -> None:
    site.write(partition="hasty", more=f"PYTHON={tmp_path}/python\nMAX_STARTS=1\n")
    (job,) = submit(cluster, site, *site.words("moe7b.sh", *NODES, f"run_dir={stand_in}"))
    wait_until((stand_in / "waits").exists, lambda: site.log(job))
    cluster.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    ended = cluster.wait(job, *END)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    assert (stand_in / "launches").read_text() == "0\npreempted\n0\n"


def test_ranks_that_pmix_starts_meet(cluster: Cluster, site: Site, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py not found: pip install 'megatron_fc[mpi]'")
    # The plugin may be there without the library that it loads.
    if cluster.run("srun", "--mpi=pmix", "true", check=False).returncode != 0:
        pytest.skip("this SLURM starts nothing with PMIx: apt-get install libpmix-dev")
    program, run_dir, log = tmp_path / "python", tmp_path / "run", tmp_path / "log"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nif sys.argv[3] == 'preflight': sys.exit()\n"
        f"from megatron_fc.mpi import join\njoin()\nopen('{run_dir}/state', 'w').write('done')\n"
        f"print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')), flush=True)\n"
    )
    program.chmod(0o755)
    site.write(more=f"PYTHON={program}\n")
    script = f"{REPOSITORY}/launch/mpi.sh srun --mpi=pmix -- configs/olmoe_7b.yaml run_dir={run_dir}"
    words = ("sbatch", "-N2", "--ntasks-per-node=2", f"--output={log}", f"--wrap={script}")
    job = cluster.run(*words, **site.variables).stdout.split()[-1]
    assert cluster.wait(job, *END)["JobState"] == "COMPLETED", log.read_text()
    lines = sorted(line for line in log.read_text().splitlines() if line[0] in "0123" and " n0" in line)
    assert lines == ["0 4 0 n0", "1 4 1 n0", "2 4 0 n0", "3 4 1 n0"]


def test_a_chain_whose_first_checkpoint_takes_40_seconds(cluster: Cluster, site: Site) -> None:
    disk = SlowDisk(site.folder / "seconds")
    site.write(*samples(400_000), "save_interval=100000", more=disk.exports)
    script = site.words("moe1b3.sh dfc_x2", *NODES, "--signal=B:USR1@600")
    jobs = submit(cluster, site, str(REPOSITORY / "launch/chain.sh"), "3", *script)
    assert len(jobs) == 3
    run_dir = site.run_dir("moe1b3-dfc_x2")
    assert {cluster.job(job)["JobName"] for job in jobs} == {"moe1b3-dfc_x2"}

    wait_for_iteration(run_dir, 3)
    disk.takes(40)
    cluster.run("scontrol", "hold", jobs[1])  # until its target is written
    elapsed = int(cluster.job(jobs[0])["RunTime"].split(":")[-2])
    cluster.run("scontrol", "update", f"JobId={jobs[0]}", f"TimeLimit={elapsed + 10}")  # the signal comes now
    first = cluster.wait(jobs[0], *END)
    disk.is_well()
    done = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])["iteration"]
    site.write(*samples(4 * done + 20), "save_interval=100000", more=disk.exports)
    cluster.run("scontrol", "release", jobs[1])
    assert (first["JobState"], first["ExitCode"]) == ("COMPLETED", "0:0")
    log = site.log(jobs[0])
    told, ended = (
        datetime.fromisoformat(re.findall(rf"^(\S+ \S+) launch: {said}", log, re.MULTILINE)[0])
        for said in ("got USR1", "ended with code 0 after USR1")
    )
    assert (ended - told).seconds >= 40

    for job in jobs[1:]:
        assert cluster.wait(job, *END)["JobState"] == "COMPLETED"
    assert "launch: the target is reached\n" in site.log(jobs[1])
    assert "launch: the target is reached already" in site.log(jobs[2])
    events = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [0, done, done, done + 5]
    assert [event.get("reason") for event in events] == [None, "signal USR1", None, "target"]


def test_a_full_disk_leaves_the_last_checkpoint_intact(cluster: Cluster, small_disk: Path, site: Site) -> None:
    site.write(*samples(80), "save_interval=5")
    run_dir = small_disk / "run"
    words = site.words("moe7b.sh", *NODES, f"run_dir={run_dir}")
    (job,) = submit(cluster, site, *words)
    assert cluster.wait(job, *END)["ExitCode"] == "3:0"
    before = intact_checkpoints(run_dir / "checkpoints")[0]
    assert f"Megatron cannot write a checkpoint to {run_dir}/checkpoints, No space left on device: " in site.log(job)
    assert f"repair that, start the same command again, it goes on from {before}, which is intact" in site.log(job)
    assert "launch: stuck: " in site.log(job)
    assert (run_dir / "state").read_text() == "stuck\n"

    (job,) = submit(cluster, site, *words)
    assert cluster.wait(job, *END)["ExitCode"] == "3:0"
    assert re.search(
        rf"{run_dir}/checkpoints has .* free, 1 more checkpoint needs .*: make room or choose another", site.log(job)
    )

    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    (job,) = submit(cluster, site, *words)
    assert cluster.wait(job, *END)["JobState"] == "COMPLETED"
    assert (run_dir / "state").read_text() == "done\n"
