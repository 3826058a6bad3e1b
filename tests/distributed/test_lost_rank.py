"""kill -9 of a rank of a real TP2+SP+PP2 training: all ranks end, and the same command goes on from the checkpoint."""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread

import psutil
import pytest

from megatron_fc.checkpoints.location import TRACKER
from megatron_fc.mpi import free_port
from megatron_fc.resilience.rank_watch import LOST_RANK_EXIT_CODE, WRONG_INPUT_EXIT_CODE
from megatron_fc.runs.metrics import read_metrics
from support import fork_server, harness
from support.patience import PATIENCE, wait_for_iteration, wait_until
from support.training_runs import command, environment, figures

# The fixture; pytest finds it by its name here.
from support.training_runs import config as config

pytestmark = pytest.mark.slow

WORLD = 4
MARK = "STARTED_BY_TEST_LOST_RANK"  # in the environment of all that a run starts
LAYOUT = ("tensor_model_parallel_size=2", "sequence_parallel=true", "pipeline_model_parallel_size=2")
SAVE_INTERVAL = 5
ASYNC = ("async_save=true", "use_persistent_ckpt_worker=true", "async_strategy=mcore")
LENGTH = ("train_iters=10000", "lr_decay_iters=20", f"save_interval={SAVE_INTERVAL}", *ASYNC)


def words(config: Path, run_dir: Path, *more: str) -> list[str]:
    return command(config, f"run_dir={run_dir}", *LAYOUT, *LENGTH, *more)


@contextmanager
def ranks(config: Path, run_dir: Path, port: int | None = None) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process per rank, as srun starts them: nobody ends the others."""
    world = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    with ended(
        [
            start(words(config, run_dir), stderr(run_dir, rank), {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(WORLD)
        ]
    ) as processes:
        yield processes


@contextmanager
def torchrun(config: Path, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    line = words(config, run_dir)
    line[2:2] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}", "-m"]
    with ended([start(line, stderr(run_dir), {})]) as processes:
        yield processes[0]


def stderr(run_dir: Path, rank: int | None = None) -> Path:
    return run_dir.with_name(f"{run_dir.name}-{'torchrun' if rank is None else rank}.err")


def start(line: list[str], errors: Path, more: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(errors, "w") as file:  # not a pipe: helpers of a killed rank would keep it open
        variables = environment() | more | {MARK: str(os.getpid())}
        return subprocess.Popen(line, env=variables, stdout=subprocess.DEVNULL, stderr=file)


@contextmanager
def ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Leave nothing behind."""
    try:
        yield processes
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(os.getpid()):
                    process.kill()
        for child in processes:
            child.wait()


@contextmanager
def file_system(folder: Path) -> Iterator[None]:
    """Of its own, so that it can be made read-only, which even root must heed."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def made_read_only(folder: Path) -> bool:
    """Not while a file in it is open for writing."""
    return subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True, check=False).returncode == 0


def finish(config: Path, run_dir: Path, iterations: int) -> None:
    """Up to an iteration, on forked ranks: they need no time to start."""
    folder, line = run_dir.with_name(f"{run_dir.name}-finish"), words(config, run_dir, f"exit_interval={iterations}")
    assert harness.run("command_line", WORLD, folder, line[3:]) == [0] * WORLD


def last_checkpoint(run_dir: Path) -> int:
    return int((run_dir / "checkpoints" / TRACKER).read_text())


def wait_for_checkpoint(run_dir: Path, *processes: subprocess.Popen[bytes]) -> None:
    """It is complete some iterations after the one that it is of."""
    written = run_dir / "checkpoints" / TRACKER
    wait_until(lambda: written.exists() or any(process.poll() is not None for process in processes), "a checkpoint")
    wait_for_iteration(run_dir, SAVE_INTERVAL + 1, *processes)


def test_all_ranks_end_and_the_same_command_goes_on(config: Path) -> None:
    undisturbed, run_dir = config.parent / "tp2-pp2", config.parent / "tp2-pp2-killed"
    with ranks(config, run_dir) as processes:
        wait_for_checkpoint(run_dir, *processes)
        killed = fork_server.process_id(processes[2])
        helpers = psutil.Process(killed).children(recursive=True)
        assert helpers, "Megatron's for checkpoints"
        os.kill(killed, signal.SIGKILL)  # it alone
        codes = [process.wait(PATIENCE) for process in processes]
        _, alive = psutil.wait_procs(helpers, PATIENCE)
        assert not alive
    assert codes == [LOST_RANK_EXIT_CODE, LOST_RANK_EXIT_CODE, -signal.SIGKILL, LOST_RANK_EXIT_CODE]
    saved = last_checkpoint(run_dir)
    for rank in (0, 1, 3):
        said = stderr(run_dir, rank).read_text()
        assert re.search(
            rf"^megatron-fc: lost rank 2 \(process {killed} on \S+\), so this rank ends: "
            rf"start the same command again, it goes on from {run_dir}/checkpoints/iter_{saved:07d}$",
            said,
            re.MULTILINE,
        ), said

    with torchrun(config, run_dir) as launcher:
        wait_for_iteration(run_dir, max(read_metrics(run_dir).loss) + SAVE_INTERVAL + 1, launcher)
        tracker = run_dir / "checkpoints" / TRACKER
        wait_until(lambda: tracker.read_text() not in ("", str(saved)) or launcher.poll(), "another checkpoint")
        ranks_of_launcher = psutil.Process(fork_server.process_id(launcher)).children()
        first = next(p for p in ranks_of_launcher if p.environ().get("RANK") == "0")
        first.kill()
        assert launcher.wait(PATIENCE) != 0
    said = stderr(run_dir).read_text()
    # torchrun ends the others as soon as it looks, which may be before they can say anything.
    assert re.search(r"lost rank 0 \(process \d+ on \S+\)", said) or "Signal 9 (SIGKILL)" in said, said

    assert last_checkpoint(run_dir) > saved
    iterations = max(read_metrics(run_dir).loss) + SAVE_INTERVAL
    for folder in (run_dir, undisturbed):
        finish(config, folder, iterations)
    assert last_checkpoint(run_dir) == iterations
    assert len(list((run_dir / "tensorboard").iterdir())) == 3
    assert figures(run_dir) == figures(undisturbed)


def test_checkpoints_that_cannot_be_written_any_more_end_all_ranks_for_that(config: Path) -> None:
    """Only the first rank meets it: it makes the folder of a checkpoint, while the others wait."""
    run_dir = config.parent / "tp2-pp2-read-only"
    with file_system(run_dir / "checkpoints"):
        with ranks(config, run_dir) as processes:
            wait_for_checkpoint(run_dir, *processes)
            wait_until(lambda: made_read_only(run_dir / "checkpoints"), "a moment in which no file is written")
            codes = [process.wait(PATIENCE) for process in processes]
        saved = last_checkpoint(run_dir)
    assert codes == [WRONG_INPUT_EXIT_CODE] * WORLD
    sentence = (
        f"Megatron cannot write a checkpoint to {run_dir}/checkpoints, Read-only file system: repair that, start the "
        f"same command again, it goes on from {run_dir}/checkpoints/iter_{saved:07d}, which is intact"
    )
    for rank in range(WORLD):
        said = stderr(run_dir, rank).read_text()
        assert re.search(rf"^megatron-fc: (rank 0 \(process \d+ on \S+\) failed: )?{sentence}$", said, re.MULTILINE), (
            said
        )
    end = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "end"
    assert "Megatron cannot write a checkpoint to " in end["reason"]


def test_a_busy_port_is_one_sentence_on_every_rank(config: Path) -> None:
    """Megatron's ranks would wait for each other for ten minutes."""
    run_dir = config.parent / "busy"
    with TCPServer(("", 0), BaseRequestHandler) as other:  # hangs up on everybody
        Thread(target=other.serve_forever, daemon=True).start()
        port = other.server_address[1]
        with ranks(config, run_dir, port) as processes:
            assert [process.wait(PATIENCE) for process in processes] == [LOST_RANK_EXIT_CODE] * WORLD
        other.shutdown()
    assert f"port {port} of " in stderr(run_dir, 0).read_text()
    for rank in range(WORLD):
        said = stderr(run_dir, rank).read_text()
        assert said.startswith("megatron-fc: ")
        assert said.endswith(", or set another MASTER_PORT\n")
        assert said.count("\n") == 1
    assert not run_dir.exists()
