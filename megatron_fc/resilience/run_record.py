"""The record of a run's starts and ends, and its answer to signals."""

import contextlib
import signal
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import Any

import torch

from megatron_fc.callbacks import Callback
from megatron_fc.checkpoints.start import StartCallback
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.runs.rank_log import is_log_rank
from megatron_fc.runs.start_record import REACHED, record_end, record_start

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # before a time limit; when the nodes are wanted for another job


class RunRecord(Callback):
    """Notes a run's start, and what ended it, in `run_dir/starts.jsonl`.

    Args:
        run_dir: folder of the run.
        args: Megatron's arguments, which count the samples.
        starting: comes before it among the callbacks, and knows where the run starts.
    """

    def __init__(self, run_dir: Path, args: Namespace, starting: StartCallback) -> None:
        self._run_dir, self._args, self._starting = run_dir, args, starting
        self._signal: str | None = None
        self._start: int | None = None
        self._finding: str | None = None

    def listen(self) -> None:
        """Let USR1 and TERM both mean what Megatron's one `exit_signal` means: save after this step, then end.

        Called when Megatron has set its own handler.
        """
        if not self._args.exit_signal_handler:
            return
        heeded: Any = signal.getsignal(self._args.exit_signal)
        signals = self._signals

        def heed(number: int, frame: FrameType | None = None) -> None:
            self._signal = signal.Signals(number).name.removeprefix("SIG")
            heeded(number, frame)

        def wait() -> None:
            while True:
                heed(signal.sigwait(signals))

        for number in signals:
            signal.signal(number, heed)  # for threads that are there already
        self._block()
        threading.Thread(target=wait, daemon=True, name="signal listener").start()

    @contextmanager
    def signals_held(self) -> Iterator[None]:
        """Processes that the body starts never hear the signals that this one is going to listen to."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._block()
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def _signals(self) -> set[int]:
        return {*_SIGNALS, self._args.exit_signal}

    def _block(self) -> None:
        """SLURM may signal every process of a task; those that this one starts inherit the mask and go on writing."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        resource_tracker.ensure_running()  # at its start, multiprocessing unblocks TERM
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        hosts: list[str] = [""] * args.world_size
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        start = self._starting.start
        self._start = start.iteration
        if is_log_rank():
            record_start(
                self._run_dir,
                hosts=hosts,
                iteration=start.iteration,
                consumed_samples=start.consumed_samples,
                target_samples=self._target(),
                checkpoint=str(start.checkpoint) if start.checkpoint else None,
                ckpt_step=start.given_step,
                changed=start.changed,
            )
        return chunks

    def end(self) -> None:
        self._end(REACHED, step_is_done=True)

    def failed(self, error: BaseException) -> BaseException:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else None
            self._end(self.why(error), step_is_done=not error.code, exit_code=code)
        elif isinstance(error, KeyboardInterrupt):
            self._end("interrupted")
        else:
            self._end(shorten(f"{type(error).__name__}: {error}", 300))
        return error

    def _end(self, reason: str, step_is_done: bool = False, exit_code: int | None = None) -> None:
        if is_log_rank():
            self.note(reason, step_is_done, exit_code)

    def note(self, reason: str, step_is_done: bool = False, exit_code: int | None = None) -> None:
        """Note the end of a run whose start was noted, on whichever rank calls it; the last one counts.

        Args:
            reason: in words.
            step_is_done: the step that Megatron began last is finished.
            exit_code: that Megatron chose.
        """
        if self._start is None:
            return
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ends
            record_end(
                self._run_dir,
                iteration=max(self._start, getattr(self._args, "curr_iteration", 0) + step_is_done),
                consumed_samples=self._args.consumed_train_samples,
                target_samples=self._target(),
                reason=reason,
                exit_code=exit_code,
            )

    def explain(self, finding: str) -> None:
        """Why Megatron is about to end the run, where that is more than a code."""
        self._finding = finding

    def why(self, end: SystemExit) -> str:
        """Why Megatron ended the run before its target."""
        if self._signal and not end.code:
            return f"signal {self._signal}"
        return self._finding or f"Megatron ended the run with code {end.code or 0}"

    def _target(self) -> int:
        batch = self._args.global_batch_size
        if self._args.train_samples is None:
            start = self._starting.start  # whose samples may have been trained in batches of another size
            return int(start.consumed_samples + max(self._args.train_iters - start.iteration, 0) * batch)
        # Megatron trains no part of a batch.
        return int(
            self._args.train_samples
            if self._args.step_batch_size_schedule
            else self._args.train_samples // batch * batch
        )
