"""Checkpoints that are written while training goes on, as in the shipped configs of the large models."""

import json
import multiprocessing
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_fc.checkpoints.location import latest_checkpoint
from megatron_fc.resilience.rank_watch import LOST_RANK_EXIT_CODE, WRONG_INPUT_EXIT_CODE
from megatron_fc.runs.metrics import read_metrics
from megatron_fc.training.cpu_lane import _write_checkpoints
from support import fork_server
from support.patience import PATIENCE, wait_for_iteration, wait_until
from support.slow_writer import preload, write_when_told

# The fixture; pytest finds it by its name here.
from support.training_runs import command, environment, figures
from support.training_runs import config as config

pytestmark = pytest.mark.slow

ASYNC = ("async_save=true", "use_persistent_ckpt_worker=true", "async_strategy=mcore", "save_interval=4")

LOADERS = ("num_workers=2",)  # which as little hear TERM as the worker: Python would wait for them for ever


def start(config: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    line = command(config, f"run_dir={run_dir}", "train_iters=10000", "lr_decay_iters=40", *more)
    return subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def worker_of(rank: psutil.Process) -> psutil.Process:
    """The only grandchild: a server of forks starts it."""
    (worker,) = [child for child in rank.children(recursive=True) if child.parent() != rank]
    return worker


def test_a_lost_worker_ends_the_run_and_the_same_command_goes_on(config: Path) -> None:
    """As if every checkpoint had been written before the next step."""
    run_dir, undisturbed = config.parent / "meanwhile", config.parent / "waits"
    job = start(config, run_dir, *ASYNC)
    wait_until(lambda: latest_checkpoint(run_dir / "checkpoints") or job.poll(), "a checkpoint")
    worker = worker_of(psutil.Process(fork_server.process_id(job)))
    worker.kill()
    said = job.communicate(timeout=PATIENCE)[1]
    saved = latest_checkpoint(run_dir / "checkpoints")
    assert job.returncode == LOST_RANK_EXIT_CODE
    assert (
        "megatron-fc: the process that writes the checkpoints of rank 0 was killed by SIGKILL, so this rank ends: "
        f"start the same command again, it goes on from {saved}\n" in said
    )
    assert "Transformer Engine" not in said, "what the worker itself says is in the log"
    job = start(config, run_dir, *ASYNC, *LOADERS)
    wait_for_iteration(run_dir, max(read_metrics(run_dir).loss) + 6, job)
    os.kill(fork_server.process_id(job), signal.SIGTERM)
    assert job.wait(PATIENCE) == 0
    last = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
    assert last["reason"] == "signal TERM"
    assert latest_checkpoint(run_dir / "checkpoints") == run_dir / "checkpoints" / f"iter_{last['iteration']:07}"

    until = f"exit_interval={last['iteration'] + 4}"
    for job in (start(config, run_dir, *ASYNC, until), start(config, undisturbed, "save_interval=10000", until)):
        assert job.wait(PATIENCE) == 0
    assert figures(run_dir) == figures(undisturbed)


def test_a_full_disk_ends_the_run_whose_process_is_gone_then(config: Path, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        (tmp_path / "ballast").write_bytes(bytes(5 << 20))  # room for one checkpoint of 2 MB
        job = start(config, tmp_path / "run", *ASYNC, *LOADERS)
        said = job.communicate(timeout=PATIENCE)[1]
        saved = latest_checkpoint(tmp_path / "run" / "checkpoints")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
    assert job.returncode == WRONG_INPUT_EXIT_CODE
    assert saved is not None
    assert (
        f"megatron-fc: Megatron cannot write a checkpoint to {tmp_path}/run/checkpoints, No space left on device: "
        f"repair that, start the same command again, it goes on from {saved}, which is intact\n" in said
    )


def test_without_a_device_too_the_worker_writes_what_there_was(tmp_path: Path) -> None:
    """The rank goes on as soon as it has been copied."""
    context = multiprocessing.get_context("forkserver")
    requests, copied, written = context.JoinableQueue(), context.JoinableQueue(), context.Queue()
    worker = context.Process(target=_write_checkpoints, args=(0, requests, copied, written), daemon=True)
    worker.start()
    trained = torch.arange(1000.0)
    buckets: Any = [("file", "key", ([], [("item", trained)]))]
    request = AsyncRequest(
        write_when_told, (0, buckets, tmp_path / "out.pt"), [], preload_fn=partial(preload, buckets), call_idx=7
    )
    copied.put(7)
    requests.put(request)
    waiting = Thread(target=copied.join, daemon=True)
    waiting.start()
    wait_until(lambda: not waiting.is_alive() or not worker.is_alive(), "the copy")
    assert not waiting.is_alive()
    trained += 1
    (tmp_path / "out.go").touch()
    assert written.get(timeout=PATIENCE) == 7
    assert torch.equal(torch.load(tmp_path / "out.pt"), torch.arange(1000.0))
    requests.put("DONE")
    worker.join(PATIENCE)
    assert worker.exitcode == 0
