"""A folder that can be written, or the system's answer why not."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from megatron_fc.errors import UserError


def refuse_unwritable(folder: Path) -> None:
    """Make a folder of results before there are some.

    Raises:
        UserError: the system does not take files there.
    """
    if failure := failure_to_write(folder):
        raise UserError(f"{folder} cannot be written, {failure.strerror}: give another folder")


def failure_to_write(folder: Path, size: int = 1 << 20) -> OSError | None:
    """Return what the system says to a file of `size` bytes there, None where it takes it; the folder is made."""
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            probe.unlink()
    return None
