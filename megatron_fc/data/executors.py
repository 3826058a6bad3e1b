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
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
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
        self._job = job

    def run(self, watch: Callable[[], None]) -> dict[int, str]:
        """Run what is not done; returns why tasks failed.

        Args:
            watch: is called every few seconds, and at the end.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_fc.data.task"])
        waiting = list(self.get_incomplete_ranks())[::-1]
        running: dict[Any, _Running] = {}  # by what tells of its end
        failures: dict[int, str] = {}
        try:
            # One thread starts, waits and reads: who starts a process looks after all others that have ended, and of
            # two threads that read the end of one, the second is told that it failed.
            while waiting or running:
                while waiting and len(running) < self.workers:
                    started = _Running.start(context, self._job.folder, waiting.pop())
                    running[started.process.sentinel] = started
                for sentinel in wait(list(running), _LOOK_SECONDS):
                    ended = running.pop(sentinel)
                    if (said := ended.failure()) is not None:
                        failures[ended.task] = said
                watch()
            return failures
        finally:
            for left in running.values():
                left.process.terminate()
            for left in running.values():
                left.process.join()


@dataclass(frozen=True)
class _Running:
    """A task, its process, and the end of the pipe through which it says why it failed."""

    task: int
    process: Any
    answers: Connection

    @classmethod
    def start(cls, context: Any, folder: Path, task: int) -> _Running:
        answers, answer = context.Pipe(duplex=False)
        process = context.Process(target=_run_task, args=(folder, task, answer))
        process.start()
        answer.close()
        return cls(task, process, answers)

    def failure(self) -> str | None:
        """Why the task failed, None if it did not; its process has ended."""
        self.process.join()
        with self.answers:
            code = self.process.exitcode
            if code == 0:
                return None
            with suppress(EOFError):
                return str(self.answers.recv())
        return (
            f"its process was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with code {code}"
        )


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
