"""A folder that can be written, or the system's answer why not."""

import os
import socket
from contextlib import suppress
from pathlib import Path


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
