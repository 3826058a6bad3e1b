"""The executors that run a job's tasks: datatrove's, on this machine or as an array of SLURM jobs."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import redirect_stderr, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_fc.data.job import Job
from megatron_fc.data.task import TIME_LIMIT_CODE, TokenizeTask, sentence
from megatron_fc.errors import UserError

_LOOK_SECONDS = 2.0


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with a process per task.

    In datatrove's pool a worker that is killed takes its task along, and the pool waits for it for ever; and the first
    task that fails ends all others.
    """

    def __init__(self, job: Job, workers: int) -> None:
        super().__init__([TokenizeTask(job.folder)], job.options.tasks, workers, logging_dir=str(job.logs))
        self._job, self._processes = job, set[Any]()

    def run(self, watch: Callable[[], None]) -> dict[int, str]:
        """Run what is not done; returns why tasks failed.

        Args:
            watch: is called every few seconds, and at the end.
        """
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["megatron_fc.data.task"])
        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = {pool.submit(self._in_a_process, task): task for task in self.get_incomplete_ranks()}
            left: set[Future[str | None]] = set(futures)
            while left:
                _, left = wait(left, _LOOK_SECONDS, FIRST_COMPLETED)
                watch()
            return {task: said for future, task in futures.items() if (said := future.result()) is not None}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._processes):
                process.terminate()
            pool.shutdown()

    def _in_a_process(self, task: int) -> str | None:
        """Returns why the task failed, None if it did not."""
        answers, answer = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run_task, args=(self._job.folder, task, answer))
        process.start()
        answer.close()
        self._processes.add(process)
        process.join()
        self._processes.discard(process)
        if process.exitcode == 0:
            return None
        with suppress(EOFError):
            return str(answers.recv())
        if process.exitcode is not None and process.exitcode < 0:
            return f"its process was killed by {signal.Signals(-process.exitcode).name}"
        return f"its process ended with code {process.exitcode}"


def _run_task(folder: Path, task: int, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job ends its tasks itself
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    try:
        # What datatrove says there is in the folder's logs, too.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            LocalExecutor(Job.read(folder), workers=1)._run_for_rank(task)
    except Exception as error:
        answer.send(sentence(error))
        sys.exit(1)


def _end_with_the_job() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's array of jobs, started with the site's Python, and with the site's options alone.

    Args:
        job: whose tasks run.
        workers: jobs at once.
        sbatch: options of sbatch, by name; `time` among them.
        srun: options of srun, e.g. the container's.
        python: that the nodes start.
    """

    def __init__(self, job: Job, workers: int, sbatch: dict[str, str], srun: Sequence[str], python: str) -> None:
        super().__init__(
            [TokenizeTask(job.folder)],
            job.options.tasks,
            sbatch["time"],
            partition="",
            workers=workers,
            job_name=f"tokenize-{job.folder.name}",
            qos="",
            sbatch_args={"signal": "USR1@90", "open-mode": "append", **sbatch},
            logging_dir=str(job.logs),
            requeue_signals=None,  # datatrove would call scontrol where the task runs, which a container lacks
        )
        self._command = [
            "srun", "--label", "--ntasks=1", *srun, python, "-m", "datatrove.tools.launch_pickled_pipeline",
            str(job.logs / "executor.pik"),
        ]  # fmt: skip

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, str]:
        said = super().get_sbatch_args(max_array)
        # What is empty is the site's own: sbatch reads its account and partition from the environment.
        return {name: value for name, value in said.items() if value or name == "requeue"}

    def run(self) -> None:
        """Submit what is not done, or on a node carry out a task.

        Raises:
            UserError: sbatch refuses, or is not here.
        """
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            signal.signal(signal.SIGUSR1, _end_before_the_limit)
            super().run()
            return
        for name in self._sbatch_args:  # sbatch would heed its environment, the site's, before the lines of its script
            os.environ.pop("SBATCH_TIMELIMIT" if name == "time" else f"SBATCH_{name.upper().replace('-', '_')}", None)
        try:
            super().run()
        except FileNotFoundError as error:
            if error.filename != "sbatch":
                raise
            raise UserError("--executor slurm: there is no sbatch here, call it where jobs are submitted") from None
        except subprocess.CalledProcessError:
            raise UserError("sbatch refuses the job, as it says above: correct --sbatch or the site file") from None

    def get_launch_file_contents(self, sbatch_args: dict[str, str], run_script: str) -> str:
        # Once more: a task that does not fit into its limit twice would not the third time.
        script = (
            f"{shlex.join(self._command)} || {{\n"
            f"  code=$?\n"
            f"  if [[ $code = {TIME_LIMIT_CODE} && ${{SLURM_RESTART_COUNT:-0}} = 0 ]]; then\n"
            f"    scontrol requeue $SLURM_JOB_ID\n"
            f"  fi\n"
            f"  exit $code\n"
            f"}}"
        )
        contents: str = super().get_launch_file_contents(sbatch_args, script)
        return contents

    def get_distributed_env(self, node_rank: int = -1) -> dict[str, str]:
        """What datatrove tells its steps of the node; its own asks scontrol, which a container lacks."""
        said: dict[str, str] = LocalPipelineExecutor.get_distributed_env(self, node_rank)
        return said

    def launch_merge_stats(self) -> None:
        """Nothing: the last task writes the manifest."""


def _end_before_the_limit(number: int, frame: object) -> None:
    # No Exception: a call into the tokenizer may be what it ends, whose errors are a document's.
    raise SystemExit(TIME_LIMIT_CODE)
