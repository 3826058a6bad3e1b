"""launch/evaluate.sh on a real SLURM: a run's checkpoints evaluated while it goes on, and its folder left alone."""

import json
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.compress_commands import run
from support.evaluations import write_tasks
from support.patience import wait_until
from support.site_files import ENDED, REPOSITORY, TINY, Site, samples, submit_to_two_nodes

pytestmark = pytest.mark.soak

CONFIG = "configs/olmoe_7b.yaml"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_checkpoints_of_a_run_that_goes_on(two_nodes: Cluster, site: Site, tmp_path: Path) -> None:
    site.write(*samples(16), "expert_model_parallel_size=2")
    trained = tmp_path / "trained"
    words = [*TINY, *site.data, *samples(16), "save_interval=2", f"run_dir={trained}"]
    done = run(tmp_path, "train", REPOSITORY / CONFIG, *words, "--brief")
    assert done.code == 0, done.printed
    (trained / "state").write_text("continue\n")
    before = contents(trained)
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    listed = tmp_path / "list.yaml"
    listed.write_text("folder: tasks\ntasks: {local_choice: {metric: acc}}\n")
    out = site.run_dir("evaluated")
    of_what = [f"of={trained}", f"tasks={listed}", "every=4", "again=600", f"run_dir={out}"]
    job = submit_to_two_nodes(two_nodes, site, f"evaluate.sh {CONFIG}", *of_what)
    # The run is not done, so the job waits for its time to start once more.
    assert two_nodes.wait(job, "PENDING", "FAILED")["JobState"] == "PENDING", site.log(job)
    wait_until(lambda: two_nodes.job(job)["Reason"] == "BeginTime", lambda: str(two_nodes.job(job)))
    assert contents(trained) == before
    results = json.loads((out / "iter_0000004.json").read_text())
    assert results["tasks"]["local_choice"]["documents"] == 5
    assert results["tokens"] == 4 * 4 * 32
    # Now it is, and nothing is run again.
    (trained / "state").write_text("done\n")
    answered = (out / "answers" / "iter_0000004.jsonl").read_text()
    two_nodes.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert two_nodes.wait(job, *ENDED)["JobState"] == "COMPLETED", site.log(job)
    assert (out / "answers" / "iter_0000004.jsonl").read_text() == answered
