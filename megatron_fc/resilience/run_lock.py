"""The lock of a run: two processes that train into one folder would write over each other.

`run_dir/lock` is created where there is none, in one step (O_EXCL), which NFS and Lustre do as local disks do; flock
they may not. Its holder, the first rank, gives a sign of life twice a minute. A lock is taken over once its holder is
known to be dead:

* its process is gone, on this machine; or the machine has booted since;
* it is an earlier start of this SLURM job, which SLURM had ended before it requeued;
* SLURM runs its job no more, or the launch scripts have given the run to this job (`run_dir/job`), which they do then;
* it has given no sign for ten minutes, by the clock of the file system. If it was only stopped it sees, when it goes
  on, that the lock is another's, and ends.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_fc.errors import UserError

LOCK = "lock"
_SIGN_SECONDS, _SILENT_SECONDS = 30.0, 600.0
_SQUEUE_SECONDS, _WRITE_SECONDS = 20.0, 5.0
_JOIN_SECONDS, _LOOK_SECONDS = 300.0, 0.5  # hundreds of ranks that import PyTorch from a cold file system need some


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run while the body runs; every rank calls it, and the first one holds it.

    Args:
        run_dir: folder of the run; created if needed.

    Raises:
        UserError: another training holds it; names that, and the way out. On all ranks, before anything is written.
    """
    lock, own = run_dir / LOCK, _own()
    if own["rank"] != 0:
        _await_first(lock, own)
        yield
        return
    _acquire(lock, own)
    is_over = threading.Event()
    threading.Thread(target=_give_signs, args=(lock, own, is_over), daemon=True, name="run lock").start()
    try:
        yield
    finally:
        is_over.set()
        if _read(lock) == own:
            lock.unlink(missing_ok=True)


def _own() -> dict[str, Any]:
    """What a lock says of its holder."""
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "processes": os.readlink("/proc/self/ns/pid"),  # a container numbers its own
        "process": process,
        "began": _began(process),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "launch": f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
        "rank": int(os.environ.get("RANK", "0")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": secrets.token_hex(),
    }


def _began(process: int) -> str | None:
    """When a process began, in ticks since the machine did; None if there is none. Numbers of processes come again."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def _acquire(lock: Path, own: dict[str, Any]) -> None:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while not _create(lock, own):
            holder = _read(lock)
            if holder is not None:
                _refuse_living(lock, holder, own)
                _remove_dead(lock, holder)
    except OSError as error:
        raise UserError(
            f"{lock} cannot be written, {error.strerror}: repair that, or choose another run_dir"
        ) from error


def _await_first(lock: Path, own: dict[str, Any]) -> None:
    """Wait for what the first rank finds where another start's lock lies: it may know more of the holder's machine."""
    deadline = time.monotonic() + _JOIN_SECONDS
    while (holder := _read(lock)) and holder["launch"] != own["launch"]:
        if time.monotonic() > deadline:
            _refuse_living(lock, holder, own)
            return
        time.sleep(_LOOK_SECONDS)


def _create(lock: Path, own: dict[str, Any]) -> bool:
    """Create the lock; False if there is one."""
    try:
        file = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with open(file, "w") as writing:
        writing.write(json.dumps(own))
    return True


def _read(lock: Path) -> dict[str, Any] | None:
    """Who holds it, None if nobody does."""
    deadline = time.monotonic() + _WRITE_SECONDS
    while True:
        try:
            return dict(json.loads(lock.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            if time.monotonic() > deadline:  # its writer died at it
                raise UserError(f"{lock} is damaged: delete it if nothing trains into {lock.parent}") from None
            time.sleep(0.1)


def _remove_dead(lock: Path, holder: dict[str, Any]) -> None:
    """Remove a dead holder's lock; that of another start, which was faster, is put back."""
    grave = lock.with_name(f"{LOCK}.{secrets.token_hex()}")
    with suppress(FileNotFoundError):
        lock.rename(grave)
        moved = _read(grave)
        if moved is not None and moved != holder:
            _create(lock, moved)
        grave.unlink()


def _refuse_living(lock: Path, holder: dict[str, Any], own: dict[str, Any]) -> None:
    silent = _silence(lock)
    if _is_dead(holder, own, _job_of(lock.parent)) or silent > _SILENT_SECONDS:
        return
    job = f" of job {holder['job']}" if holder["job"] else ""
    raise UserError(
        f"run_dir={lock.parent} belongs to process {holder['process']} on {holder['host']}{job}, which has trained "
        f"since {holder['time']} and gave a sign of life {silent:.0f} s ago: wait for it, end it, or choose another "
        f"run_dir; if it is gone, delete {lock}"
    )


def _is_dead(holder: dict[str, Any], own: dict[str, Any], job_of_run: str | None) -> bool:
    """Whether the holder of a lock is known to have ended."""
    if holder["boot"] == own["boot"]:
        if holder["processes"] == own["processes"]:
            return _began(holder["process"]) != holder["began"]
    elif holder["host"] == own["host"]:
        return True
    if holder["job"] is None:
        return False
    if holder["job"] == own["job"]:
        return bool(holder["restart"] < own["restart"])
    return (own["job"] is not None and own["job"] == job_of_run) or not _runs_in_slurm(holder["job"])


def _job_of(run_dir: Path) -> str | None:
    """The job that the launch scripts have given a run to, once no other one had it."""
    job = run_dir / "job"
    return job.read_text().strip() if job.exists() else None


def _runs_in_slurm(job: str) -> bool:
    """Whether SLURM may still run a job; True where it does not answer."""
    states = "RUNNING,SUSPENDED,STOPPED,COMPLETING,CONFIGURING,SIGNALING,STAGE_OUT"
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", job, "-t", states],
            capture_output=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.strip())


def _silence(lock: Path) -> float:
    """Seconds since the holder gave a sign of life, by the clock that stamps files."""
    probe = lock.with_name(f"{LOCK}.{secrets.token_hex()}")
    probe.touch()
    try:
        return max(probe.stat().st_mtime - lock.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink()


def _give_signs(lock: Path, own: dict[str, Any], is_over: threading.Event) -> None:
    while not is_over.wait(_SIGN_SECONDS):
        with suppress(OSError):  # a disk that does not answer now; silence is noticed by others alone
            if _read(lock) is None:
                _create(lock, own)
            if (holder := _read(lock)) != own and holder is not None and not is_over.is_set():
                print(
                    f"megatron-fc: {lock} is now that of process {holder['process']} on {holder['host']}, so this "
                    f"training ends: two would write over each other",
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(2)
            os.utime(lock)
