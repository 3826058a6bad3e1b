"""TensorBoard's events: on disk when the run has ended, and a full disk is no end of a run."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_fc.runs.metrics import read_metrics
from megatron_fc.training.events import EventsOnDisk, outlive_full_disk


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system answers a write behind it as that of a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_last_validation_is_on_disk_when_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    monkeypatch.setattr("megatron.training.global_vars._GLOBAL_TENSORBOARD_WRITER", writer)
    # The writer's thread computes its checksum in Python, which takes it far longer than a reader to begin.
    writer.add_text("arguments", "x" * 2**20)
    writer.add_scalar("lm loss validation", 8.25, 4)
    EventsOnDisk().end()
    assert read_metrics(tmp_path).validation == {4: 8.25}


def test_a_full_disk_is_said_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from megatron.training import global_vars

    monkeypatch.setattr("threading.excepthook", lambda _: None)  # of the writer's thread, which the disk ends
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", SummaryWriter(str(tmp_path / "tensorboard")))
    outlive_full_disk()
    monkeypatch.setattr("sys.__stderr__", open(2, "w", closefd=False))  # noqa: SIM115
    events = EventsOnDisk()

    def step(iteration: int) -> None:
        global_vars.get_tensorboard_writer().add_scalar("lm loss", iteration / 4, iteration)
        events.after_step(iteration)

    step(1)
    with no_file_larger_than(200):
        for iteration in range(2, 12):
            step(iteration)
    for iteration in range(12, 15):  # there is room again; the first flush finds out
        step(iteration)
    said = capfd.readouterr().err
    assert said.count(f"WARNING: {tmp_path}/tensorboard cannot be written, File too large: the run goes on") == 1
    losses = read_metrics(tmp_path).scalars["lm loss"]
    assert losses[1] == 0.25
    assert losses[13] == 3.25
    assert losses[14] == 3.5
