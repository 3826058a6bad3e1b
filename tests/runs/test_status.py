"""`megatron-fc runs` on the folders that runs leave: new, going on, killed, finished, of an older release."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_fc.cli.main import main
from megatron_fc.connections.kinds import from_label
from megatron_fc.megatron.flags import store_connection
from megatron_fc.runs.status import find_runs, read_run

# As Megatron prints it, 1,024 sequences a step.
LINE = (
    " [2026-11-24 03:05:29.027146] iteration {iteration:8d}/     100 | consumed samples: {samples:12d} | elapsed time "
    "per iteration (ms): 500.0 | learning rate: 2.000000E-04 | global batch size:  1024 | lm loss: {loss:.6E} | loss "
    "scale: 1.0 | grad norm: 2.968 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def write_log(run_dir: Path, last: int, rank: int = 0, torn: str = "") -> Path:
    log = run_dir / "logs" / f"rank{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [LINE.format(iteration=i, samples=1024 * i, loss=10 / i) for i in range(1, last + 1)]
    log.write_text("building model\n" + "\n".join(lines) + "\n" + torn)
    return log


VALIDATION = " validation loss at iteration 5 on {name} set | lm loss value: {loss:.6E} | lm loss PPL: 1.0E+02 | \n"


def write_arguments(run_dir: Path, **arguments: object) -> None:
    """As Megatron leaves them in the events, before the first scalars."""
    values = {"seq_length": 4096, "global_batch_size": 1024, "frac_rate": 4, "frac_dynamic": True} | arguments
    with SummaryWriter(str(run_dir / "tensorboard")) as writer:
        for name, value in values.items():
            writer.add_text(name, str(value), global_step=0)
        writer.add_scalar("lm loss", 3.0, 1)


def write_checkpoint(run_dir: Path, iteration: int, complete: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    if complete:
        (folder / ".metadata").touch()
        (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def event(kind: str, iteration: int, **facts: object) -> str:
    line = {"event": kind, "time": f"2026-11-24T10:{iteration % 60:02d}:00+00:00", "job": "17", "restart": 0}
    line |= {"iteration": iteration, "consumed_samples": 1024 * iteration, "target_samples": 102400}
    line |= {"host": ["node1", "node2"], "world_size": 16, "checkpoint": None} if kind == "start" else {}
    return json.dumps(line | facts) + "\n"


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    write_log(tmp_path, 40, rank=15)
    write_log(tmp_path, 0, rank=0)  # only the last rank logs iterations
    write_arguments(tmp_path)
    write_checkpoint(tmp_path, 20)
    write_checkpoint(tmp_path, 30)
    write_checkpoint(tmp_path, 40, complete=False)
    (tmp_path / "state").write_text("continue\n")
    (tmp_path / "starts.jsonl").write_text(
        event("start", 0) + event("end", 20, reason="signal USR1") + event("start", 20) + event("start", 30)
    )
    run = read_run(tmp_path)
    assert (run.state, run.connection) == ("running", "dfc_x4")
    assert (run.iteration, run.iterations) == (40, 100)
    assert (run.tokens, run.target_tokens) == (40 * 1024 * 4096, 100 * 1024 * 4096)
    assert run.tokens_per_second == 1024 * 4096 / 0.5
    assert run.eta_seconds == 30.0
    assert [start.end for start in run.starts] == ["signal USR1", "no end was noted", None]
    assert run.starts[2].host == "node1 node2"
    assert [(c.iteration, c.complete) for c in run.checkpoints] == [(40, False), (30, True), (20, True)]
    assert run.newest == 30
    assert run.losses[-1] == (40, 0.25)


def test_samples_count_where_the_batch_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 steps of 512, then of 1,024."""
    log = write_log(tmp_path, 0)
    log.write_text(
        "".join(LINE.format(iteration=i, samples=512 * 40 + 1024 * (i - 40), loss=2) + "\n" for i in (70, 80))
    )
    write_arguments(tmp_path)
    target = 512 * 40 + 1024 * 60
    changed = {"global_batch_size": [512, 1024]}
    (tmp_path / "starts.jsonl").write_text(
        event("start", 0, target_samples=512 * 100) + event("start", 40, target_samples=target, changed=changed)
    )
    run = read_run(tmp_path)
    assert (run.tokens, run.target_tokens) == ((512 * 40 + 1024 * 40) * 4096, target * 4096)
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert " 75.0% " in printed
    assert "there changed global_batch_size 512 -> 1024\n" in printed


def test_the_other_states(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert read_run(tmp_path / "new").state == "new"

    dead = tmp_path / "dead"
    log = write_log(dead, 5)
    (dead / "starts.jsonl").write_text(event("start", 0))
    for path in (log, dead / "starts.jsonl"):
        os.utime(path, (time.time() - 3600,) * 2)
    run = read_run(dead)
    assert (run.state, run.eta_seconds) == ("silent", None)
    assert run.silent_seconds == pytest.approx(3600, abs=60)

    ended = tmp_path / "ended"
    write_log(ended, 5)
    (ended / "starts.jsonl").write_text(event("start", 0) + event("end", 5, reason="OSError: disk"))
    assert (read_run(ended).state, read_run(ended).starts[0].end) == ("ended", "OSError: disk")
    (ended / "state").write_text("stuck\n")
    assert read_run(ended).state == "stuck"


def test_a_run_of_an_older_release(tmp_path: Path) -> None:
    write_log(tmp_path, 100)
    write_arguments(tmp_path, frac_rate=None)
    write_checkpoint(tmp_path, 100)
    run = read_run(tmp_path)
    assert (run.state, run.connection, run.starts) == ("done", "residual", [])
    assert run.tokens == run.target_tokens == 100 * 1024 * 4096


@pytest.mark.parametrize("label", ["sfc_x2", "dfc_x8", "shc_x3", "dhc_x4", "dhc_x4_m2", "mhc_x4", "mfc_x2"])
def test_the_connection_of_a_run(label: str, tmp_path: Path) -> None:
    arguments = Namespace(frac_rate=None)
    store_connection(arguments, from_label(label))
    write_log(tmp_path, 1)
    write_arguments(tmp_path, **vars(arguments))
    assert read_run(tmp_path).connection == label


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, 7, torn=LINE.format(iteration=8, samples=8192, loss=1.0)[:-60])
    write_arguments(tmp_path)
    (tmp_path / "starts.jsonl").write_text(
        event("start", 0) + event("end", 3, reason="x")[:30] + "\n" + event("start", 3)[:40]
    )
    for events in (tmp_path / "tensorboard").iterdir():
        events.write_bytes(events.read_bytes()[:-50])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("")
    run = read_run(tmp_path)
    assert (run.iteration, run.unreadable, run.newest) == (7, 2, None)
    assert run.tokens == 7 * 1024 * 4096


def test_the_last_validation_not_the_test_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path, 5)
    with open(log, "a") as file:
        file.write(VALIDATION.format(name="validation", loss=2.0) + VALIDATION.format(name="test", loss=3.0))
    assert read_run(tmp_path).validation == (5, 2.0)
    assert main(["runs", str(tmp_path)]) == 0
    assert "validation   5: 2.0000\n" in capsys.readouterr().out


def test_without_a_line_yet_the_starts_tell(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text(event("start", 30))
    run = read_run(tmp_path)
    assert (run.state, run.iteration, run.tokens, run.losses) == ("running", 30, None, [])


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = write_log(tmp_path, 100)
    log.write_text("x" * 1_000_000 + "\n" + log.read_text())
    assert read_run(tmp_path).losses[0][0] == 96


def test_runs_are_found_below_folders(tmp_path: Path) -> None:
    write_log(tmp_path / "sweep" / "a", 1)
    write_log(tmp_path / "b", 1)
    (tmp_path / "copy" / "bin").mkdir(parents=True)
    (tmp_path / "copy" / "bin" / "tensorboard").touch()
    assert find_runs([tmp_path]) == [tmp_path / "b", tmp_path / "sweep" / "a"]
    assert find_runs([tmp_path / "b", tmp_path]) == [tmp_path / "b", tmp_path / "sweep" / "a"]


def test_table_and_details(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one"
    write_log(one, 50)
    write_arguments(one)
    write_checkpoint(one, 40)
    (one / "starts.jsonl").write_text(
        event("start", 0) + event("end", 20, reason="signal USR1") + event("start", 20, job=None)
    )
    (tmp_path / "two").mkdir()
    assert main(["runs", str(one)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "209.715M",
        "50.0%",
        "8,388,608",
        "progress     iteration 50 of 100, 209,715,200 of 419,430,400 tokens",
        "starts       2026-11-24T10:00:00+00:00  job 17, node1 node2, from iteration 0: signal USR1",
        "             2026-11-24T10:20:00+00:00  node1 node2, from iteration 20: runs",
        "restarts     1: signal USR1",
        "checkpoints  iteration 40, ",
        "losses       46: 0.2174  47: 0.2128  48: 0.2083  49: 0.2041  50: 0.2000",
    ):
        assert part in printed
    assert main(["runs", str(one), str(tmp_path / "two")]) == 0
    assert " new " in capsys.readouterr().out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, 3)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert found[0]["iteration"] == 3
    assert found[0]["losses"][-1] == [3, pytest.approx(10 / 3)]


def test_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder: give the folder of a run" in capsys.readouterr().err


def test_a_login_node_needs_no_torch(tmp_path: Path) -> None:
    write_log(tmp_path, 3)
    write_arguments(tmp_path)
    code = (
        "import sys; from megatron_fc.cli.main import main; main(['runs', sys.argv[1]]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'numpy', 'tensorflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
